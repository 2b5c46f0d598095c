import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_lb.launch.rank.names import this_rank

# What hvd_lb.launch.rank.entry does before the training begins, and then tells instead of training.
_TELL = """
import json, os, subprocess, sys, types
KERNELS = "ATEN_CPU_CAPABILITY", "MKL_CBWR"
worker = types.ModuleType("hvd_lb.launch.rank.train")
def main(job, rank, host, cores):
    print("said", rank, host, flush=True)
    print("wrong", file=sys.stderr, flush=True)
    subprocess.run(["echo", "child"])
    seen = {name: os.environ.get(name) for name in ("A", "HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME", *KERNELS)}
    with open(os.path.join(json.loads(job)["output"], "logs", "seen.json"), "w") as file:
        file.write(json.dumps([seen, "torch" in sys.modules]))
    if os.environ.get("WAIT"):
        import time
        time.sleep(60)
worker.main = main
import hvd_lb.launch.rank
sys.modules["hvd_lb.launch.rank.train"] = hvd_lb.launch.rank.train = worker
from hvd_lb.launch.rank.entry import main
main(sys.argv[1])
"""


def job(tmp_path: Path, **environment: str) -> Path:
    (tmp_path / "logs").mkdir()
    file = tmp_path / "logs" / "job.json"
    content = {
        "starter": "ssh",
        "device": "cpu",
        "pin": False,
        "output": str(tmp_path),
        "hosts": [["h1", 2], ["h2", 2]],
        "interfaces": {"h1": "eth0", "h2": "ens3"},
        "environment": environment,
    }
    file.write_text(json.dumps(content))
    return file


def start(file: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _TELL, str(file)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=pipe, stderr=pipe, text=True)


def test_a_rank_finds_its_host_interface_environment_and_log(tmp_path: Path) -> None:
    file = job(tmp_path, A="b")
    process = start(file, HOROVOD_RANK="2", HOROVOD_SIZE="4", A="other")
    said, complained = process.communicate(timeout=60)
    assert (process.returncode, said, complained) == (0, "", "")
    assert sorted((tmp_path / "logs" / "rank-0002-h2.log").read_text().split()) == [
        "2",
        "child",
        "h2",
        "said",
        "wrong",
    ]
    seen, torch = json.loads((tmp_path / "logs" / "seen.json").read_text())
    interface = {"HOROVOD_GLOO_IFACE": "ens3", "NCCL_SOCKET_IFNAME": "=ens3"}
    assert seen == {"A": "b", **interface, "ATEN_CPU_CAPABILITY": None, "MKL_CBWR": None}
    assert not torch, "torch was loaded before the environment was set"


def test_an_interface_that_the_user_named_for_nccl_stays(tmp_path: Path) -> None:
    with start(job(tmp_path, NCCL_SOCKET_IFNAME="ib0"), HOROVOD_RANK="0") as process:
        process.communicate(timeout=60)
    seen, _ = json.loads((tmp_path / "logs" / "seen.json").read_text())
    assert (seen["HOROVOD_GLOO_IFACE"], seen["NCCL_SOCKET_IFNAME"]) == ("eth0", "ib0")


def test_variables_by_which_kernels_are_chosen_are_those_of_the_run_and_not_of_its_host(
    tmp_path: Path,
) -> None:
    file = job(tmp_path, MKL_CBWR="AVX2")
    own = {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"}
    with start(file, HOROVOD_RANK="0", **own) as process:
        process.communicate(timeout=60)
    seen, _ = json.loads((tmp_path / "logs" / "seen.json").read_text())
    assert (seen["MKL_CBWR"], seen["ATEN_CPU_CAPABILITY"]) == ("AVX2", None)


@pytest.mark.slow
def test_a_rank_ends_when_nobody_listens_any_more(tmp_path: Path) -> None:
    file = job(tmp_path)
    process = start(file, HOROVOD_RANK="0", WAIT="1")
    try:
        assert process.stderr is not None
        assert process.stdout is not None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        process.stderr.close()
        process.stdout.close()
        assert process.wait(10) == 1
    finally:
        process.send_signal(signal.SIGKILL)


def test_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"OMPI_COMM_WORLD_RANK": "3"})
    assert this_rank() == 0
    monkeypatch.setattr(os, "environ", {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"})
    assert this_rank() == 3
