"""One question asked of many hosts at once, and why one of them gave no answer."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from hvd_lb.errors import UserError
from hvd_lb.launch.options import LaunchOptions

#: What Python says where there is no hvd-lb, or one of another version.
NOT_INSTALLED = re.compile("No module named|Error while finding module specification")
SSH_FAILED = 255  # ssh's own exit code, not that of the command
_LOOK_SECONDS = 0.2

#: Asks hosts by name; gives what each answered (the output of the probe), or why it did not.
Ask = Callable[[list[str], str], Mapping[str, str | UserError]]


def written_by(
    process: subprocess.Popen[str], said: str | None, seconds: float, over: Callable[[], bool]
) -> tuple[str, str] | None:
    """What it writes when it is `said` that, until it ends; None where that takes longer, or it is `over` meanwhile."""
    late = time.monotonic() + seconds
    while not over() and time.monotonic() < late:
        try:
            return process.communicate(said, _LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            said = None
    return None


def ask_all(
    commands: dict[str, list[str]], question: str, seconds: float, over: threading.Event | None = None
) -> dict[str, subprocess.CompletedProcess[str] | None]:
    """Run one command per host, all at once, with the question on stdin; None for one that did not end in time.

    None is left behind, and waited for, when it is `over`, or who asks is interrupted.
    """
    interrupted, over = threading.Event(), over or threading.Event()

    def ask(host: str) -> subprocess.CompletedProcess[str] | None:
        pipe = subprocess.PIPE
        with subprocess.Popen(
            commands[host], stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace"
        ) as process:
            try:
                written = written_by(
                    process, question, seconds, lambda: interrupted.is_set() or over.is_set()
                )
            finally:
                process.kill()
            return written and subprocess.CompletedProcess(process.args, process.returncode, *written)

    with ThreadPoolExecutor(max_workers=min(64, len(commands))) as pool:
        try:
            return dict(zip(commands, pool.map(ask, commands), strict=True))
        except BaseException:
            interrupted.set()
            raise


def explain_failure(
    host: str, completed: subprocess.CompletedProcess[str] | None, options: LaunchOptions
) -> str:
    """Why a host gave no answer, and what to do, in one line."""
    if completed is None:
        return "no answer in time: is it up, and are its file systems?"
    at = f" on port {options.ssh_port}" if options.ssh_port is not None else ""
    meanings = (
        ("Could not resolve hostname", "no such host: check its name, or put it into /etc/hosts"),
        ("Permission denied", f"key refused{at}: ssh-copy-id {host}, or name another key with --ssh-key"),
        ("Too many authentication failures", f"key refused{at}: name the right one with --ssh-key"),
        (
            "IDENTIFICATION HAS CHANGED",
            f"its host key is another than in known_hosts: if it was set up anew, ssh-keygen -R {host}",
        ),
        (
            "Host key verification failed",
            f"its host key is not in known_hosts: log in once by hand (ssh {host}), or leave --strict-host-keys out",
        ),
        ("Connection refused", f"no sshd answers{at}: start one there, or name its port with --ssh-port"),
        ("timed out", f"no answer{at}: is it up, and does a firewall let ssh through?"),
        ("No route to host", "no route to it: is it up, and in this network?"),
        ("Network is unreachable", "no route to it: is this machine in its network?"),
    )
    said = next(
        (
            meaning
            for text, meaning in meanings
            if completed.returncode == SSH_FAILED and text in completed.stderr
        ),
        None,
    )
    last = next((line.strip() for line in reversed(completed.stderr.splitlines()) if line.strip()), "")
    last = last or f"exit code {completed.returncode}"
    if said is None and (completed.returncode in (126, 127) or NOT_INSTALLED.search(completed.stderr)):
        said = f"no hvd-lb there ({last}): install it where it is here, {sys.executable}"
    return said or f"it gave no answer: {last}"
