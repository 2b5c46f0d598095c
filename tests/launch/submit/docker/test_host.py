"""The first process of a container, here on the loopback: a real sshd, real signals, and what ends it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hvd_lb.launch.submit.docker import host as host_process
from hvd_lb.launch.submit.docker.host import Messages, sshd_config

needs_sshd = pytest.mark.skipif(
    shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") is None or shutil.which("ssh") is None,
    reason="needs an sshd: apt-get install openssh-server openssh-client",
)
pytestmark = pytest.mark.slow  # a real sshd for each

HOSTILE = {
    "QUOTES": "a \"b\" 'c'",
    "SHELL_SYNTAX": "$(touch /tmp/x); `id` \\ #",
    "SPACES": "  two  ",
    "EMPTY": "",
}


class HostProcess:
    """The first process of a container, and the key that opens its sshd."""

    def __init__(self, home: Path):
        self.home, self.key = home, home / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True)
        with socket.socket() as probe:
            probe.bind(("", 0))
            self.port = probe.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hvd_lb.launch.submit.docker.host"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "HOME": str(home), "TMPDIR": str(home)},
            text=True,
        )

    def send(self, **message: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def become_host(self, environment: dict[str, str] | None = None) -> str:
        """Its host key."""
        public = self.key.with_suffix(".pub").read_text().strip()
        private = self.key.read_text()
        self.send(port=self.port, authorized_key=public, private_key=private, environment=environment or {})
        answer = self.read()
        assert answer, self.end()
        key: str = json.loads(answer)["host_key"]
        self.send(known_hosts=[f"[127.0.0.1]:{self.port} {key}"])
        until(lambda: (self.home / ".ssh" / "known_hosts").exists())
        return key

    def ssh(self, command: str, key: Path | None = None) -> list[str]:
        # Not by ~/.ssh, which ssh looks for in the home that /etc/passwd names.
        known = f"UserKnownHostsFile={self.home}/.ssh/known_hosts"
        return [
            *("ssh", "-F", "none", "-i", str(key or self.home / ".ssh" / "id_ed25519"), "-p", str(self.port)),
            *("-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", known, "127.0.0.1", command),
        ]

    def read(self) -> str:
        """A line of its output."""
        assert self.process.stdout
        return self.process.stdout.readline()

    def lose(self) -> None:
        """Nobody is at the other end of its input any more."""
        assert self.process.stdin
        self.process.stdin.close()

    def end(self) -> tuple[int, str, str]:
        """Its exit status and what else it said, once it has ended."""
        status = self.process.wait(30)
        assert self.process.stdout
        assert self.process.stderr
        return status, self.process.stdout.read(), self.process.stderr.read()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostProcess]:
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # what Debian's service makes
    it = HostProcess(tmp_path)
    yield it
    # Asked to end, it ends its sshd too; outside of a container that of a killed one would stay.
    it.process.terminate()
    it.process.wait(30)
    for stream in (it.process.stdin, it.process.stdout, it.process.stderr):
        with suppress(BrokenPipeError):  # what was sent to it after its end
            stream.close()


def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@needs_sshd
def test_sessions_see_the_environment_as_it_is(host: HostProcess) -> None:
    host.become_host({**HOSTILE, "LINES": "a\nb"})
    got = subprocess.run(host.ssh("env -0"), capture_output=True, text=True, check=True, timeout=30)
    seen = dict(line.split("=", 1) for line in got.stdout.split("\0") if line)
    assert {name: seen.get(name) for name in HOSTILE} == HOSTILE
    assert "LINES" not in seen
    assert seen["HOME"] != str(host.home)


@needs_sshd
def test_only_the_key_of_the_run_opens_it(host: HostProcess, tmp_path: Path) -> None:
    host.become_host()
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    refused = subprocess.run(host.ssh("true", other), capture_output=True, text=True, timeout=30)
    assert refused.returncode == 255
    assert "Permission denied (publickey)" in refused.stderr


@needs_sshd
def test_nobody_else_can_read_the_keys(host: HostProcess) -> None:
    host.become_host()
    files = [*(host.home / ".ssh").iterdir(), *next(host.home.glob("hvd-lb-host-*")).iterdir()]
    assert {path.name for path in files} > {"id_ed25519", "known_hosts", "host_key", "authorized_keys"}
    assert not [
        path for path in files if path.suffix != ".pub" and path.name != "log" and path.stat().st_mode & 0o077
    ]


@needs_sshd
def test_ends_with_its_input_and_leaves_nothing(host: HostProcess) -> None:
    host.become_host()
    host.lose()
    assert host.end()[0] == 1
    with socket.socket() as connection:
        assert connection.connect_ex(("127.0.0.1", host.port)) != 0
    assert not list(host.home.glob("hvd-lb-host-*"))


@needs_sshd
def test_ends_with_its_command_and_its_exit_code(host: HostProcess) -> None:
    host.become_host({"FROM": "host"})
    host.send(run=[sys.executable, "-c", "import os, sys; print(os.environ['FROM']); sys.exit(7)"])
    assert host.end() == (7, "host\n", "")


@needs_sshd
def test_a_command_that_is_not_there(host: HostProcess) -> None:
    host.become_host()
    host.send(run=["no-such-program"])
    assert host.end() == (1, "", "hvd-lb: no-such-program cannot be run: No such file or directory\n")


WAITS = """
import signal, sys, time
def end(number, _):
    print("got", number, flush=True)
    time.sleep(0.5)
    sys.exit(3)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
print("waiting", flush=True)
while True:
    time.sleep(0.05)  # a signal that comes right before a sleep does not end it
"""


@needs_sshd
def test_a_signal_reaches_the_command(host: HostProcess) -> None:
    host.become_host()
    host.send(run=[sys.executable, "-c", WAITS])
    assert host.read() == "waiting\n"
    host.send(signal=int(signal.SIGINT))
    assert host.end() == (3, "got 2\n", "")


COUNTS = """
import signal, time
got = []
signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
print("waiting", flush=True)
while not got:
    time.sleep(0.05)
time.sleep(2)
print(len(got), flush=True)
"""


@needs_sshd
def test_what_several_ask_for_at_once_reaches_the_command_once(host: HostProcess) -> None:
    """As when Slurm signals the launcher, docker and all else of a job: a second SIGTERM would skip the checkpoint."""
    host.become_host()
    host.send(run=[sys.executable, "-c", COUNTS])
    assert host.read() == "waiting\n"
    host.process.terminate()
    host.send(signal=int(signal.SIGTERM))
    host.lose()
    assert host.end()[:2] == (0, "1\n")


@needs_sshd
def test_who_asks_twice_means_it(host: HostProcess) -> None:
    host.become_host()
    host.send(run=[sys.executable, "-c", COUNTS])
    assert host.read() == "waiting\n"
    for _ in range(2):
        host.send(signal=int(signal.SIGTERM))
        time.sleep(0.5)
    assert host.end()[:2] == (0, "2\n")


@needs_sshd
def test_a_lost_launcher_gives_the_command_time_to_end(host: HostProcess) -> None:
    host.become_host()
    host.send(run=[sys.executable, "-c", WAITS])
    assert host.read() == "waiting\n"
    host.lose()
    assert host.end() == (3, "got 15\n", "")


@needs_sshd
def test_a_lost_launcher_gives_sessions_time_to_end(host: HostProcess, tmp_path: Path) -> None:
    host.become_host()
    session = subprocess.Popen(host.ssh("echo there; sleep 1; echo done"), stdout=subprocess.PIPE, text=True)
    assert session.stdout
    assert session.stdout.readline() == "there\n"
    host.lose()
    assert host.end()[0] == 1
    assert session.communicate(timeout=10)[0] == "done\n"


@needs_sshd
def test_a_terminated_host_process_takes_its_command_along(host: HostProcess) -> None:
    host.become_host()
    host.send(run=[sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"])
    pid = int(host.read())
    host.process.terminate()
    assert host.end()[0] == 128 + signal.SIGTERM
    until(lambda: not Path(f"/proc/{pid}").exists())


@needs_sshd
def test_says_that_its_port_is_in_use(host: HostProcess) -> None:
    with socket.create_server(("", host.port)):
        host.send(port=host.port, authorized_key="", private_key=None)
        expected = f"hvd-lb: port {host.port} cannot be listened on: Address already in use\n"
        assert host.end() == (1, "", expected)


@needs_sshd
def test_says_that_sshd_died(host: HostProcess) -> None:
    host.become_host()
    children = Path(f"/proc/{host.process.pid}/task/{host.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    status, _, error = host.end()
    assert (status, error) == (1, "hvd-lb: sshd ended by itself with exit code -9\n")


@needs_sshd
def test_never_writes_over_a_key_of_somebody(host: HostProcess) -> None:
    mine = host.home / ".ssh" / "id_ed25519"
    mine.parent.mkdir()
    mine.write_text("precious")
    host.send(port=host.port, authorized_key="", private_key="other")
    assert host.end() == (1, "", f"hvd-lb: {mine} cannot be made: File exists\n")
    assert mine.read_text() == "precious"


def test_silence_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_process, "SILENCE_SECONDS", 0.2)
    reading, writing = os.pipe()
    try:
        messages = Messages(reading)
        os.write(writing, b'{"signal": 2}\n{}\n{"ru')
        assert [messages.next(1), messages.next(1)] == [{"signal": 2}, {}]
        assert messages.next(0.1) is None
        os.write(writing, b'n": []}\n')
        assert messages.next(1) == {"run": []}
        with pytest.raises(EOFError):
            messages.next(0.3)
    finally:
        os.close(reading)
        os.close(writing)


def test_what_belongs_to_a_login_is_not_handed_on() -> None:
    environment = {"HOME": "/root", "USER": "root", "A": "1", "BASH_FUNC_f%%": "() { :; }", "B": 'x"y\\z'}
    assert sshd_config(Path("/f"), 5, environment).splitlines()[-1] == r'SetEnv "A=1" "B=x\"y\\z"'
