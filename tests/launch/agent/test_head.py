"""A head, agents and processes of this machine; in place of ranks scripts that need no torch and no Horovod."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from real_runs import kill_all, processes_of, until
from torch.distributed import TCPStore

from hvd_lb.launch.agent.head import CONTROL
from hvd_lb.launch.launch_plan import head_command

pytestmark = pytest.mark.slow

Entry = dict[str, Any]
TWO = [("127.0.0.1", 2), ("127.0.0.2", 1)]
WAIT = "import time; time.sleep(300)"
# Line by line what a rank's `open_line` and `tell` do.
TELL = """
import json, os, socket
rank = int(os.environ["HOROVOD_RANK"])
line = socket.socket(fileno=int(os.environ["HVD_LB_AGENT_FD"]))
def tell(kind, **values): line.send(json.dumps({"kind": kind, **values}).encode())
"""


class Run:
    """A job that was started."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, folder: Path):
        self.process, self.control, self.folder = process, control, folder

    def wait(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)

    @property
    def endings(self) -> list[Entry]:
        file = self.folder / "logs" / "endings.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def ranks(self) -> dict[str, Entry]:
        file = self.folder / "logs" / "ranks.json"
        return json.loads(file.read_text())["ranks"] if file.exists() else {}

    @property
    def waiting(self) -> str:
        return str(json.loads((self.folder / "logs" / "ranks.json").read_text())["waiting"])

    def log(self, rank: int, host: str = "127.0.0.1") -> str:
        file = self.folder / "logs" / f"rank-{rank:04d}-{host}.log"
        return file.read_text() if file.exists() else ""

    def pids(self, module: str) -> list[int]:
        found = []
        for pid in processes_of(self.folder):
            if module in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
        return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """start(script, hosts=…, ssh=…): a job whose ranks run that script; ended with the test."""
    started = []

    def begin(
        script: str,
        hosts: list[tuple[str, int]] = TWO,
        ssh: tuple[str, ...] = (),
        elastic: int = 0,
        **environment: str,
    ) -> Run:
        # The ranks, and they alone, find this in place of `hvd_lb.launch.rank.entry`.
        package = tmp_path / "stub" / "hvd_lb" / "launch" / "rank"
        package.mkdir(parents=True)
        (package / "entry.py").write_text(script)
        run = tmp_path / "run"
        (run / "logs").mkdir(parents=True)
        variables = {
            "PYTHONPATH": str(tmp_path / "stub"),
            "HOROVOD_GLOO_TIMEOUT_SECONDS": "600",
            **environment,
        }
        job = {
            "hosts": hosts,
            "processes": sum(n for _, n in hosts),
            "output": str(run),
            "environment": variables,
            "recipe": {"cache": "none"},
            **({"elastic": True, "min_processes": elastic} if elastic else {}),
        }
        (run / "logs" / "job.json").write_text(json.dumps(job))
        ours, theirs = socket.socketpair()
        with (run / "launcher.log").open("wb") as log:
            process = subprocess.Popen(
                head_command(run / "logs" / "job.json", "127.0.0.1", "each", ssh),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, CONTROL: str(theirs.fileno())},
                pass_fds=(theirs.fileno(),),
            )
        theirs.close()
        started.append(Run(process, ours, run))
        return started[-1]

    yield begin
    for run in started:
        run.control.close()
        kill_all(run.folder)
        run.process.kill()
        run.process.wait()


def listening(pids: list[int]) -> list[tuple[str, int]]:
    """Addresses and ports on which these processes wait for others."""
    links = {os.readlink(fd) for pid in pids for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *rest = line.split()
        if state == "0A" and f"socket:[{rest[5]}]" in links:
            address, port = local.split(":")
            found.append((socket.inet_ntoa(bytes.fromhex(address)[::-1]), int(port, 16)))
    return found


def test_ranks_know_their_places_and_all_end_well(start: Callable[..., Run]) -> None:
    run = start(
        "import os; print({name: os.environ[name] for name in os.environ if name.startswith('HOROVOD')})"
    )
    assert run.wait() == 0
    assert sorted((entry["rank"], entry["host"], entry["status"]) for entry in run.endings) == [
        (0, "127.0.0.1", 0),
        (1, "127.0.0.1", 0),
        (2, "127.0.0.2", 0),
    ]
    assert "'HOROVOD_CROSS_SIZE': '2'" in run.log(0)
    assert "'HOROVOD_LOCAL_SIZE': '1'" in run.log(2, "127.0.0.2")
    assert not processes_of(run.folder)


def test_what_a_rank_puts_others_get_whatever_their_host(start: Callable[..., Run]) -> None:
    run = start(
        "import os, urllib.request as u\n"
        "e = os.environ; rank = e['HOROVOD_RANK']\n"
        'at = f\'http://{e["HOROVOD_GLOO_RENDEZVOUS_ADDR"]}:{e["HOROVOD_GLOO_RENDEZVOUS_PORT"]}/global/\'\n'
        "value = rank.encode() * 100_000\n"
        "u.urlopen(u.Request(at + rank, value, method='PUT'))\n"
        "print({other: u.urlopen(at + other).read() == other.encode() * 100_000 for other in '012'})\n"
    )
    assert run.wait() == 0
    everything = "{'0': True, '1': True, '2': True}\n"
    assert (run.log(0), run.log(2, "127.0.0.2")) == (everything, everything)


def test_the_first_that_fails_ends_all_and_is_told_from_those_that_were_ended(
    start: Callable[..., Run],
) -> None:
    run = start(f"import os, sys\nif os.environ['HOROVOD_RANK'] == '1': sys.exit(7)\n{WAIT}")
    assert run.wait() == 1
    first, *others = run.endings
    assert (first["rank"], first["status"], first["signalled"]) == (1, 7, False)
    assert {(entry["rank"], entry["status"], entry["signalled"]) for entry in others} == {
        (0, -signal.SIGTERM, True),
        (2, -signal.SIGTERM, True),
    }
    assert not processes_of(run.folder)


def test_who_does_not_heed_sigterm_is_killed(start: Callable[..., Run]) -> None:
    run = start(
        "import os, pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "here = pathlib.Path(__file__).parent; (here / os.environ['HOROVOD_RANK']).touch()\n"
        "while os.environ['HOROVOD_RANK'] == '2':\n"
        "    if all((here / rank).exists() for rank in '01'): sys.exit(1)\n"
        f"    time.sleep(0.1)\n{WAIT}"
    )
    assert run.wait() == 1
    assert {entry["status"] for entry in run.endings} == {1, -signal.SIGKILL}


def test_a_killed_rank_is_heard_with_its_signal(start: Callable[..., Run]) -> None:
    run = start(WAIT)
    until(lambda: len(run.ranks) == 3 and all("pid" in rank for rank in run.ranks.values()), 60)
    os.kill(run.ranks["2"]["pid"], signal.SIGKILL)
    assert run.wait() == 1
    assert (run.endings[0]["rank"], run.endings[0]["status"]) == (2, -signal.SIGKILL)


@pytest.mark.parametrize("victim", ["launching", "head", "host"])
def test_nobody_outlives_the_others(start: Callable[..., Run], victim: str) -> None:
    """The ranks have children, and heed no signal."""
    run = start(f"import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.fork()\n{WAIT}")
    until(lambda: len(run.pids("launch.rank.entry")) == 6, 60)
    if victim == "launching":
        run.control.close()
    else:
        os.kill(run.pids(f"launch.agent.{victim}")[-1], signal.SIGKILL)
    assert run.wait(30) in (1, -signal.SIGKILL)
    until(lambda: not run.pids("agent"), 30)
    if victim == "launching":
        until(lambda: not processes_of(run.folder), 30)
    if victim == "host":
        (lost,) = [entry for entry in run.endings if "lost" in entry]
        assert lost["host"] in ("127.0.0.1", "127.0.0.2")
        assert "its agent was killed" in lost["lost"]


def test_a_stop_ends_all_at_once(start: Callable[..., Run]) -> None:
    run = start(WAIT)
    until(lambda: len(run.pids("launch.rank.entry")) == 3, 60)
    run.control.send(b'{"stop": true}\n')
    assert run.wait() == 1
    assert {entry["status"] for entry in run.endings} == {-signal.SIGTERM}


@pytest.mark.long
def test_a_job_ends_though_an_agent_stands_still(start: Callable[..., Run]) -> None:
    run = start(WAIT)
    until(lambda: len(run.pids("launch.rank.entry")) == 3, 60)
    os.kill(agents(run, "127.0.0.1")[0], signal.SIGSTOP)
    run.control.send(b'{"stop": true}\n')
    assert run.wait() == 1
    until(lambda: not processes_of(run.folder), 10)


def test_a_signal_reaches_one_rank_or_all(start: Callable[..., Run]) -> None:
    run = start(
        f"{TELL}\nimport signal, time, sys\n"
        "count = 0\n"
        "def got(*_):\n    global count; count += 1; tell('got', count=count)\n"
        "signal.signal(signal.SIGUSR1, got)\n"
        "tell('ready')\n"
        "while True: time.sleep(1)\n"
    )
    until(lambda: len(run.ranks) == 3 and all("ready" in rank for rank in run.ranks.values()), 60)
    usr1 = int(signal.SIGUSR1)
    run.control.send(json.dumps({"signal": usr1, "rank": 2}).encode() + b"\n")
    until(lambda: "got" in run.ranks["2"], 60)
    assert "got" not in run.ranks["0"]
    run.control.send(json.dumps({"signal": usr1, "rank": None}).encode() + b"\n")
    until(lambda: run.ranks["0"].get("got", {}).get("count") == 1, 60)
    until(lambda: run.ranks["2"]["got"]["count"] == 2, 60)


def test_the_newest_of_what_ranks_tell_is_kept(start: Callable[..., Run]) -> None:
    run = start(f"{TELL}\nfor step in range(1000): tell('step', step=step, rank=rank)\n")
    assert run.wait() == 0
    for rank in range(3):
        told = run.ranks[str(rank)]["step"]
        assert (told["step"], told["rank"]) == (999, rank)
        assert told["time"] <= time.time()
        assert run.ranks[str(rank)]["ended"] == 0


def test_who_is_late_is_named_and_given_up(start: Callable[..., Run]) -> None:
    run = start(f"{TELL}\nif rank != 1: tell('arrived')\n{WAIT}", HOROVOD_GLOO_TIMEOUT_SECONDS="4")
    until(lambda: (run.folder / "logs" / "ranks.json").exists() and "1 of 3" in run.waiting, 60)
    assert run.waiting == "waiting for 1 of 3 ranks: 127.0.0.1 rank 1"
    assert run.wait() == 1
    assert (run.endings[0]["late"], run.endings[0]["seconds"]) == ([1], 4.0)


FAKE_SSH = """#!/bin/sh
# HOST COMMAND: the first login of each host is turned away as a busy sshd does it.
if mkdir "$FAKE/$1" 2>/dev/null; then
    echo "kex_exchange_identification: Connection closed by remote host" >&2
    exit 255
fi
exec sh -c "$2"
"""


def fake_ssh(folder: Path, text: str) -> tuple[str, ...]:
    file = folder / "ssh"
    file.write_text(text.replace("$FAKE", str(folder)))
    file.chmod(0o755)
    return (str(file),)


def test_a_login_that_was_turned_away_is_tried_again(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start("", hosts=[("192.0.2.1", 1), ("192.0.2.2", 2)], ssh=fake_ssh(tmp_path, FAKE_SSH))
    assert run.wait() == 0
    assert len(run.endings) == 3


def test_a_host_that_cannot_be_started_is_lost_with_the_reason(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    ssh = fake_ssh(tmp_path, "#!/bin/sh\necho 'ssh: connect to host: No route to host' >&2; exit 255\n")
    run = start(WAIT, hosts=[("127.0.0.1", 1), ("192.0.2.1", 2)], ssh=ssh)
    assert run.wait() == 1
    lost = run.endings[0]
    assert (lost["host"], lost["ranks"]) == ("192.0.2.1", [1, 2])
    assert lost["lost"] == "its agent did not start: ssh: connect to host: No route to host"


# What a rank of an elastic job says: how far it is when it is told that its generation is over, and when it has begun.
MEMBER = """
import json, os, signal, socket, sys
line = socket.socket(fileno=int(os.environ["HVD_LB_AGENT_FD"]))
def tell(kind, **values): line.send(json.dumps({"kind": kind, **values}).encode())
place = os.environ.get("HVD_LB_MEMBER")
number, generation, step = (int(place.split()[0]), -1, -1) if place else (int(os.environ["HOROVOD_RANK"]), 0, 0)
waits = False
def ready():
    global waits
    waits = True
    tell("awaits", generation=generation, step=step, unfinished=False)
def asked(*_):
    tell("notice")
    if not waits:
        tell("leaving")
        os._exit(0)
tell("arrived")
tell("stage", hangs=False)
if place: ready()
signal.signal(signal.SIGTERM, asked)
while message := line.recv(1 << 17):
    said = json.loads(message)
    if said["kind"] in ("over", "ask"): ready()
    if said["kind"] == "dismiss":
        tell("leaving")
        break
    if said["kind"] == "begin":
        generation, step, waits = said["generation"], step + 1, False
        print(generation, [n for _, n in said["hosts"]], said["change"]["lost"], flush=True)
        tell("begun", generation=generation)
"""


def generations(run: Run) -> list[int]:
    return [entry["processes"] for entry in run.endings if "generation" in entry]


def agents(run: Run, host: str) -> list[int]:
    """Those of that host."""
    return [
        pid
        for pid in run.pids("launch.agent.host")
        if Path(f"/proc/{pid}/cmdline").read_text().split("\0")[-2] == host
    ]


@pytest.mark.parametrize("stands_still", [False, True])
def test_an_agent_of_an_elastic_job_is_lost_and_its_host_gets_another(
    start: Callable[..., Run], stands_still: bool
) -> None:
    run = start(MEMBER, elastic=3, HVD_LB_HANG_TIMEOUT="4")
    until(lambda: len(run.ranks) == 3 and all("arrived" in rank for rank in run.ranks.values()), 60)
    (agent,) = agents(run, "127.0.0.1")
    os.kill(agent, signal.SIGSTOP if stands_still else signal.SIGKILL)
    until(lambda: generations(run) == [3], 60)
    (lost,) = [entry for entry in run.endings if "lost" in entry]
    assert lost["ranks"] == [0, 1]
    why = "no word from it for 6 s" if stands_still else "its connection ended"
    how = f"its agent was killed, or its host or network went away ({why})"
    until(lambda: run.log(3), 30)
    assert run.log(3) == f"1 [1, 2] ['ranks 0, 1 on 127.0.0.1 ({how})']\n"
    assert len(run.pids("launch.rank.entry")) == 3  # those of the agent that stands still were killed with it
    assert run.process.poll() is None


def test_a_host_with_notice_is_left_also_while_too_few_are_there(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    waits = f"if place and number == 3:\n    while not os.path.exists({str(gate)!r}): time.sleep(0.05)\n"
    script = MEMBER.replace('tell("arrived")', f'import time\n{waits}tell("arrived")')
    run = start(script, elastic=3)
    until(lambda: len(run.ranks) == 3 and all("arrived" in rank for rank in run.ranks.values()), 60)
    os.kill(run.ranks["0"]["pid"], signal.SIGKILL)
    log = run.folder / "launcher.log"
    until(lambda: "fewer than --min-processes 3: waiting" in log.read_text(), 60)
    (agent,) = agents(run, "127.0.0.2")
    os.kill(agent, signal.SIGTERM)
    until(lambda: "127.0.0.2 is lost (it had notice to end)" in log.read_text(), 60)
    assert [(entry["rank"], entry["status"]) for entry in run.endings if "rank" in entry] == [(0, -9), (2, 0)]
    assert not agents(run, "127.0.0.2")
    gate.touch()
    until(lambda: "rank 3 on 127.0.0.1 is ready to join" in log.read_text(), 60)
    assert generations(run) == []
    assert run.process.poll() is None


def test_a_host_with_notice_gets_no_ranks_while_it_is_the_same_but_when_it_is_named_again(
    start: Callable[..., Run],
) -> None:
    run = start(MEMBER, elastic=2)
    until(lambda: len(run.ranks) == 3 and all("arrived" in rank for rank in run.ranks.values()), 60)
    log = run.folder / "launcher.log"
    os.kill(*agents(run, "127.0.0.2"), signal.SIGTERM)
    until(
        lambda: "127.0.0.2: it had notice to end, and has not been started anew" in log.read_text(),
        60,
    )
    assert len(run.ranks) == 3
    run.control.send(b'{"gone": "127.0.0.2"}\n{"come": "127.0.0.2", "slots": 1, "interface": ""}\n')
    until(lambda: generations(run) == [3], 60)
    assert "127.0.0.2 is back: 1 starting there" in log.read_text()
    assert run.log(3, "127.0.0.2") == "1 [2, 1] []\n"


def test_a_host_with_notice_gets_ranks_when_it_has_been_started_anew(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    """Each login comes to a container of its own here."""
    alone = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    if subprocess.run([*alone, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("this machine allows no namespaces")
    ssh = fake_ssh(tmp_path, f'#!/bin/sh\nexec {" ".join(alone)} sh -c "$2"\n')
    run = start(MEMBER, hosts=[("127.0.0.1", 1), ("192.0.2.1", 1)], ssh=ssh, elastic=1)
    until(lambda: len(run.ranks) == 2 and all("arrived" in rank for rank in run.ranks.values()), 60)
    os.kill(agents(run, "192.0.2.1")[-1], signal.SIGTERM)
    until(lambda: generations(run) == [2], 60)
    log = (run.folder / "launcher.log").read_text()
    assert "192.0.2.1 is back: 1 starting there" in log
    assert "has not been started anew" not in log


def test_a_newcomer_that_cannot_start_ends_no_elastic_job_and_its_host_is_tried_again(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    script = f"import os, sys\nif os.environ.get('HVD_LB_MEMBER', '').startswith('3 '): sys.exit(2)\n{MEMBER}"
    run = start(script, elastic=3)
    until(lambda: len(run.ranks) == 3 and all("arrived" in rank for rank in run.ranks.values()), 60)
    os.kill(run.ranks["2"]["pid"], signal.SIGKILL)  # the only one of its host
    until(lambda: generations(run) == [3], 60)
    assert [entry["lost"] for entry in run.endings if "lost" in entry] == [
        "rank 3 ended before it had joined (exit code 2)"
    ]


def test_nobody_takes_the_place_of_one_that_computed_wrongly(start: Callable[..., Run]) -> None:
    """Though it was killed before it could leave."""
    run = start(MEMBER.replace("if place: ready()", 'if not place: tell("wrong", members=[2])'), elastic=2)
    until(
        lambda: "pid" in run.ranks.get("2", {}) and "rank 2" in (run.folder / "launcher.log").read_text(), 60
    )
    os.kill(run.ranks["2"]["pid"], signal.SIGKILL)
    until(lambda: generations(run) == [2], 60)
    assert (run.folder / "launcher.log").read_text().count(
        "computed wrongly and is taken out; its place there"
    ) == 1
    assert len(run.ranks) == 3


@pytest.mark.long
def test_one_that_says_nothing_when_a_generation_is_over_is_killed(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(MEMBER, elastic=3, HVD_LB_HANG_TIMEOUT="8")  # a quarter of it is an agent's patience
    until(lambda: len(run.ranks) == 3 and all("arrived" in rank for rank in run.ranks.values()), 60)
    os.kill(run.ranks["1"]["pid"], signal.SIGSTOP)
    os.kill(run.ranks["0"]["pid"], signal.SIGKILL)
    until(lambda: 3 in generations(run), 90)
    ended = {entry["rank"]: entry["status"] for entry in run.endings if "status" in entry}
    assert ended == {0: -signal.SIGKILL, 1: -signal.SIGKILL}


def test_a_stranger_at_the_door_changes_nothing(start: Callable[..., Run]) -> None:
    run = start(WAIT)
    until(lambda: len(run.pids("launch.rank.entry")) == 3, 60)
    ((address, port),) = listening(run.pids("launch.agent.head"))
    assert address == "127.0.0.1"
    for _ in range(20):
        with socket.create_connection((address, port)) as stranger:
            stranger.sendall(b"\x09127.0.0.1" + bytes(64))
            stranger.recv(1000)
    assert run.process.poll() is None
    assert len(run.pids("launch.rank.entry")) == 3


TORCH = """
import os, sys
environment = {**os.environ, "PYTHONPATH": os.environ["REAL"], "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
os.execve(sys.executable, [sys.executable, os.environ["RANK_OF_TORCH"], "again"], environment)
"""


def test_ranks_of_torch_meet_in_spite_of_strangers_at_every_door(start: Callable[..., Run]) -> None:
    """The head and the agents are asked by who has no secret, all the while, and are no store for him."""
    ranks = Path(__file__).parents[2] / "world" / "ranks" / "world_of_torch.py"
    four = [("127.0.0.1", 2), ("127.0.0.2", 2)]
    run = start(TORCH, hosts=four, REAL=os.pathsep.join(sys.path), RANK_OF_TORCH=str(ranks))
    until(lambda: len(run.pids("world_of_torch")) == 4, 60)
    doors = listening(run.pids("launch.agent"))
    assert len(doors) == 3
    answers = []
    while run.process.poll() is None:
        time.sleep(0.1)
        for door in doors:
            with suppress(OSError), socket.create_connection(door, timeout=1) as stranger:
                key = "hvd_lb%2F0%2F0%2Fgloo%2F0%2F0"
                stranger.sendall(f"PUT /guess/0/torch/{key} HTTP/1.1\r\nContent-Length: 0\r\n\r\n".encode())
                answers.append(stranger.recv(1000)[:12])
            with suppress(OSError), socket.create_connection(door, timeout=1) as stranger:
                stranger.sendall(f"GET /guess/0/torch/{key} HTTP/1.1\r\n\r\n".encode())
                answers.append(stranger.recv(1000)[:12])
    assert run.wait() == 0
    assert [run.log(rank, host) for rank, host in ((0, "127.0.0.1"), (3, "127.0.0.2"))] == [
        "again and again\n"
    ] * 2
    assert answers.count(b"HTTP/1.1 403") > 20


def test_torchs_own_client_finds_no_store_there(rendezvous: Any) -> None:
    address, port = rendezvous.environment()["HOROVOD_GLOO_RENDEZVOUS_ADDR"].partition("/")[0].split(":")
    with pytest.raises(RuntimeError):
        TCPStore(address, int(port), timeout=timedelta(seconds=1), wait_for_workers=False).list_keys()


def test_an_agent_imports_no_torch() -> None:
    """Nor anything else that is large: there is one for every host, and a head."""
    for module in ("head", "host"):
        program = f"import json, sys, hvd_lb.launch.agent.{module}; print(json.dumps(sorted(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert not {"torch", "numpy", "pydantic", "rich", "horovod", "yaml"} & set(json.loads(done.stdout))
