"""The first process of a container that serves as a host: `python -m hvd_lb.launch.submit.docker.host`.

Its life is its standard input, so that no container outlives the launching process, however that ends. Each line there
is a JSON object, and an empty one only says that the launching process is alive:

    {"port": 12345, "authorized_key": "…", "private_key": "…" or null, "environment": {…}}   first: become a host
    {"known_hosts": ["[h1]:12345 ssh-ed25519 …", …]}                                         whom to trust
    {"run": ["hvd-lb", "train", …]}              run this; its output is this process's, its exit code too
    {"signal": 2}                                for the command that runs

The first is answered with {"host_key": "ssh-ed25519 …"} once sshd accepts. The process ends with the command, when
sshd dies, at the end of input, after 120 s of silence, and by a signal. In the last three cases the command gets
SIGTERM and it and all ssh sessions have a minute to end by themselves, with a checkpoint. The end of a container's
first process ends all others.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SILENCE_SECONDS = 120.0  #: a launcher that says nothing for so long is gone
GRACE_SECONDS = 60.0  #: for a command to end by itself
_START_SECONDS = 20.0
_LOOK_SECONDS = 0.2
# What a login makes anew; all else that the container was given is for its ssh sessions too.
_OF_A_LOGIN = {"HOME", "HOSTNAME", "LOGNAME", "MAIL", "OLDPWD", "PWD", "SHELL", "SHLVL", "TERM", "USER", "_"}


class HostError(Exception):
    """Says in one line why this cannot be, or no longer is, a host."""


class Messages:
    """The objects that arrive on a descriptor, a line each."""

    def __init__(self, descriptor: int):
        self._descriptor, self._waiting = descriptor, b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(descriptor, selectors.EVENT_READ)
        self._heard = time.monotonic()

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next one, None when there is none within so many seconds. EOFError when the other side is gone."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._waiting:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                if time.monotonic() - self._heard > SILENCE_SECONDS:
                    raise EOFError
                return None
            received = os.read(self._descriptor, 65536)
            if not received:
                raise EOFError
            self._waiting += received
            self._heard = time.monotonic()
        line, _, self._waiting = self._waiting.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def sshd_config(folder: Path, port: int, environment: Mapping[str, str]) -> str:
    """A server for this user alone, with the key in `folder` and sessions that see `environment`."""
    lines = [
        f"Port {port}",
        f"HostKey {folder}/host_key",
        f"AuthorizedKeysFile {folder}/authorized_keys",
        "AuthenticationMethods publickey",
        "PermitRootLogin prohibit-password",
        "PidFile none",
        "UsePAM no",
        "UseDNS no",
        "X11Forwarding no",
        # One session per process of a job, all at once: from 10 on, the default turns some away at random.
        "MaxStartups 1000",
        # `folder` is for its owner only; what lies above it, such as /tmp, would not pass sshd's own check.
        "StrictModes no",
    ]
    variables = [
        _quoted(f"{name}={value}")
        for name, value in environment.items()
        # A line of the file cannot hold a line break. A shell's exported functions are not variables.
        if name not in _OF_A_LOGIN and re.fullmatch(r"\w+", name, re.ASCII) and "\n" not in value
    ]
    return "\n".join([*lines, "SetEnv " + " ".join(variables)]) + "\n"


def _quoted(text: str) -> str:
    """One word for sshd's reader of its configuration."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@contextmanager
def host(
    port: int, authorized_key: str, private_key: str | None
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An sshd that accepts, and its public key; gone at the end."""
    program = shutil.which("sshd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if program is None:
        raise HostError("no sshd here: apt-get install openssh-server")
    _check_free(port)
    folder = Path(tempfile.mkdtemp(prefix="hvd-lb-host-"))
    sshd = None
    try:
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", folder / "host_key"], check=True
        )
        _write_private(folder / "authorized_keys", authorized_key + "\n")
        if private_key:
            _write_private(_ssh_folder() / "id_ed25519", private_key)
        _write_private(folder / "sshd_config", sshd_config(folder, port, os.environ))
        with (folder / "log").open("wb") as log:
            sshd = subprocess.Popen(
                [program, "-D", "-e", "-f", folder / "sshd_config"], stdin=subprocess.DEVNULL, stderr=log
            )
        _await(sshd, folder / "log")
        yield sshd, (folder / "host_key.pub").read_text("utf-8").strip()
    finally:
        if sshd and sshd.poll() is None:
            sshd.terminate()
            sshd.wait()
        shutil.rmtree(folder)


def hold(messages: Messages, sshd: subprocess.Popen[bytes]) -> int:
    """Do what the messages say until this host has served; the exit status.

    The end of the messages and a signal to this process ask the command to end, and give it and all sessions a while.
    Several may ask at once, such as the launching process and Docker when a scheduler signals all processes: the
    command hears it as often as the one says it that says it most, as a second time means at once.
    """
    command: subprocess.Popen[bytes] | None = None
    deadline: float | None = None
    lost = False
    signals_sent = from_launcher = 0
    own: list[int] = []
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: own.append(number))
    try:
        while True:
            if sshd.poll() is not None:
                raise HostError(f"sshd ended by itself with exit code {sshd.returncode}")
            if command and (status := command.poll()) is not None:
                return status if status >= 0 else 128 - status
            _reap({sshd.pid, command.pid if command else 0})
            message: dict[str, Any] = {}
            if lost:
                time.sleep(_LOOK_SECONDS)
            else:
                try:
                    message = messages.next(_LOOK_SECONDS) or {}
                except EOFError:
                    lost = True
            if deadline is None and (own or lost):
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline and ((command is None and not _sessions(sshd)) or time.monotonic() > deadline):
                return 1
            if "known_hosts" in message:
                lines = "".join(f"{line}\n" for line in message["known_hosts"])
                _write_private(_ssh_folder() / "known_hosts", lines)
            if "run" in message:
                command = _start(message["run"])
            from_launcher += "signal" in message
            if command and max(from_launcher, len(own), lost) > signals_sent:
                signals_sent += 1
                command.send_signal(message.get("signal", signal.SIGTERM))
    finally:
        if command and command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        raise HostError(f"{command[0]} cannot be run: {error.strerror}") from None


def _sessions(sshd: subprocess.Popen[bytes]) -> bool:
    """Whether anyone is logged in: sshd has a process for each."""
    with suppress(OSError):
        return bool(Path(f"/proc/{sshd.pid}/task/{sshd.pid}/children").read_text())
    return False


def _reap(own: set[int]) -> None:
    """Bury orphans: the first process of a container inherits them, and they would stay as zombies."""
    with suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid in own:
                return
            os.waitpid(ended.si_pid, 0)


def _check_free(port: int) -> None:
    """HostError when `port` cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            raise HostError(f"port {port} cannot be listened on: {error.strerror}") from None


def _await(sshd: subprocess.Popen[bytes], log: Path) -> None:
    """Return when sshd says that it listens."""
    deadline = time.monotonic() + _START_SECONDS
    while "Server listening on" not in (said := log.read_text("utf-8", "replace")):
        if sshd.poll() is not None or time.monotonic() > deadline:
            raise HostError(f"sshd does not start: {' '.join(said.split()) or 'it says nothing'}")
        time.sleep(0.02)


def _ssh_folder() -> Path:
    folder = Path.home() / ".ssh"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _write_private(path: Path, text: str) -> None:
    """A new file for its owner's eyes only; HostError rather than writing over somebody's."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise HostError(f"{path} cannot be made: {error.strerror}") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def main() -> int:
    for number in _SIGNALS:
        signal.signal(number, _end)
    messages = Messages(sys.stdin.fileno())
    try:
        first = messages.next(SILENCE_SECONDS)
        if first is None:
            return 1
        os.environ.update(first.get("environment", {}))
        with host(first["port"], first["authorized_key"], first["private_key"]) as (sshd, key):
            print(json.dumps({"host_key": key}), flush=True)
            return hold(messages, sshd)
    except EOFError:
        return 1
    except HostError as error:
        print(f"hvd-lb: {error}", file=sys.stderr, flush=True)
        return 1


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
