"""Shared by all tests: real runs and jobs."""

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch

from hvd_lb.launch.agent.rendezvous import Rendezvous
from hvd_lb_cli.commands import run as run_command

hypothesis.settings.register_profile("any machine", deadline=None)  # times are no results
hypothesis.settings.load_profile("any machine")
pytest.register_assert_rewrite("real_runs", "elastic_runs")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests share the machine, and OpenMP's threads spin while they wait for a core. A run in this process may have
    set another number, with which sums of floats are others."""
    torch.set_num_threads(1)


@pytest.fixture
def equal_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """For worlds that multiply this process's numbers by their size: what each rank says of its weights is its own."""
    from hvd_lb.optim.exchange.replicas import Replicas

    monkeypatch.setattr(Replicas, "_draw", lambda *_: None)


@pytest.fixture
def no_save_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of a trainer in this process as on a fast disk: on a slow one some are left out."""
    from hvd_lb.training.checkpoint import BackgroundWriter

    save = BackgroundWriter.save
    monkeypatch.setattr(
        BackgroundWriter, "save", lambda self, *words, **named: save(self, *words, **{**named, "wait": True})
    )


@dataclass(frozen=True)
class Job:
    """What a job has left behind; `output` holds both of its streams."""

    returncode: int
    output: str


@pytest.fixture(scope="session")
def horovodrun() -> Callable[..., Job]:
    """horovodrun(script, np, *args, timeout=90): `np` processes of a script on this machine, over Gloo."""
    launcher = Path(sys.executable).with_name("horovodrun")
    if importlib.util.find_spec("horovod") is None or not launcher.exists():
        pytest.skip("Horovod is not installed; docker/build-horovod.sh builds it")

    def run(script: Path, np: int, *args: object, timeout: float = 90) -> Job:
        options = ["--gloo", "-np", np, "-H", f"localhost:{np}", "--network-interface", "lo"]
        return _run([launcher, *options, sys.executable, script, *args], timeout)

    return run


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., Job]:
    """torchrun(script, np, *args, timeout=90): the same by torchrun."""

    def run(script: Path, np: int, *args: object, timeout: float = 90) -> Job:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return _run([*launcher, "--nproc-per-node", np, script, *args], timeout)

    return run


def _run(command: Sequence[object], timeout: float) -> Job:
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    job = subprocess.Popen(
        [str(part) for part in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        job.send_signal(signal.SIGTERM)  # the launcher takes its processes with it
        try:
            output, _ = job.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            output, _ = job.communicate()
        pytest.fail(f"{command} was still running after {timeout} s; its output:\n{output}")
    return Job(job.returncode, output)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start("train", …) as a process of its own; ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "hvd_lb_cli.main", *map(str, arguments)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


@pytest.fixture
def rendezvous() -> Iterator["Served"]:
    """That of an agent, in a thread."""

    async def open_() -> Rendezvous:
        return Rendezvous()

    async def close() -> None:
        server.close()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(open_(), loop).result()
    yield Served(server, loop)
    asyncio.run_coroutine_threadsafe(close(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@dataclass(frozen=True)
class Served:
    server: Rendezvous
    loop: asyncio.AbstractEventLoop

    def environment(self, client: int = 0, generation: int = 0) -> dict[str, str]:
        """Of a rank."""
        return self.server.environment(str(client), generation)

    def end(self, generation: int) -> None:
        self.loop.call_soon_threadsafe(self.server.end, generation)


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str


@pytest.fixture
def hvd_lb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """hvd_lb("train", …) in this process."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["hvd-lb", *map(str, arguments)])
        status = run_command(sys.argv[1:])
        captured = capsys.readouterr()
        return Said(status, captured.out, captured.err)

    return run
