"""Jobs of a real Slurm: ranks started by srun without ssh, batch scripts, cancellation, loss of a node, preemption."""

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hosts import lab
from slurm import Cluster, slurm

ROOT = Path(__file__).parents[2]
SLOTS = {"h1": 2, "h2": 1, "h3": 3}

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod"),
]

LAUNCH = """
import json, os, subprocess, sys
from pathlib import Path
from hvd_lb.launch.rendezvous import rendezvous
from hvd_lb.launch.slurm import allocation, one_per_node, srun_command

address, worker = sys.argv[1:]
hosts = allocation("cpu")
probe = [sys.executable, "-c", "import os; print(input(), os.environ['SLURMD_NODENAME'])"]
asked = subprocess.run(
    one_per_node([name for name, _ in hosts], probe), input="question\\n", stdout=subprocess.PIPE, text=True
)
with rendezvous(address, hosts, sum(slots for _, slots in hosts)) as environment:
    Path(worker).with_suffix(".env").write_text(json.dumps(dict(environment)))
    status = subprocess.run(srun_command(hosts, [sys.executable, worker])).returncode
print("LAUNCH", json.dumps([hosts, sorted(asked.stdout.splitlines()), status]))
"""
WORKER = """
import json, os, socket, sys
from pathlib import Path
sys.path.insert(0, ROOT)
from hvd_lb.launch.slurm import rank_environment

os.environ.update(json.loads(Path(__file__).with_suffix(".env").read_text()))
os.environ.update(rank_environment(os.environ), HOROVOD_GLOO_IFACE="eth0")
import torch, horovod.torch as hvd
hvd.init()
total = hvd.allreduce(torch.tensor([2.0 ** hvd.rank()]), op=hvd.Sum).item()
ranks = [hvd.rank(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size()]
print("REPLY", json.dumps([*ranks, socket.gethostname(), total, os.environ.get("CUDA_VISIBLE_DEVICES")]))
assert "SECRET" not in os.environ
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with lab(["h0", *SLOTS]) as (head, *nodes), slurm(head, {node: SLOTS[node.name] for node in nodes}) as it:
        yield it


def python(*lines: str) -> str:
    return "#!/bin/sh\nexec " + " ".join(lines) + "\n"


def said(text: str, word: str) -> list[object]:
    """The JSON after a word, of all lines that begin with it, sorted."""
    return sorted(json.loads(line.partition(word)[2]) for line in text.splitlines() if line.startswith(word))


def batch(cluster: Cluster, tmp_path: Path, script: str, *options: str, seconds: float = 90) -> str:
    """What a batch script wrote, once the job has ended."""
    log = tmp_path / "log"
    environment = {"PYTHONPATH": str(ROOT), "SECRET": "geheim"}
    command = ["sbatch", "--wait", f"--output={log}", *options]
    cluster.run(command, input=script, env=environment, timeout=seconds, check=False)
    return log.read_text()


def test_ranks_fill_uneven_nodes_and_find_each_other_without_ssh(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "launch.py").write_text(LAUNCH)
    (tmp_path / "worker.py").write_text(WORKER.replace("ROOT", repr(str(ROOT))))
    script = python(sys.executable, f"{tmp_path}/launch.py", "10.77.0.2", f"{tmp_path}/worker.py")
    log = batch(cluster, tmp_path, script, "--nodes=3", "--ntasks=6")
    nodes = [["h1", 2], ["h2", 1], ["h3", 3]]
    assert said(log, "LAUNCH") == [[nodes, [f"question {name}" for name in SLOTS], 0]], log
    assert said(log, "REPLY") == [
        [0, 0, 2, 0, 3, "h1", 63.0, None],
        [1, 1, 2, 0, 2, "h1", 63.0, None],
        [2, 0, 1, 1, 3, "h2", 63.0, None],
        [3, 0, 3, 2, 3, "h3", 63.0, None],
        [4, 1, 3, 1, 2, "h3", 63.0, None],
        [5, 2, 3, 0, 1, "h3", 63.0, None],
    ], log
