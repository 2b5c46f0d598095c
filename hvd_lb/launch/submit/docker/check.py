"""Before containers are started: whether each host has Docker, its GPUs where they are asked for, and the data.

Asked by a few lines of shell, as these hosts need no Python. The rest is for the preflight inside.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence

from hvd_lb.doctor.finding import Finding
from hvd_lb.launch.options import LaunchOptions
from hvd_lb.launch.preflight.ask import SSH_FAILED, ask_all, explain_failure
from hvd_lb.launch.preflight.judge import PreflightReport
from hvd_lb.launch.starters.ssh import Reach
from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.docker.commands import FIND_GPUS, explain

_ANSWER_SECONDS = 60.0
# Arguments: the paths that have to be there. Docker's own words, when it fails, say why.
_SCRIPT = (
    FIND_GPUS
    + """
docker version --format 'server {{.Server.Version}}' || exit $?
if runtime; then echo 'gpus NVIDIA runtime'; elif cdi; then echo 'gpus CDI devices'; fi
for path do [ -r "$path" ] || printf 'missing %s\\n' "$path"; done
"""
)


def probe_command(submission: Submission) -> list[str]:
    """What is run on a host to ask it."""
    paths = [os.fspath(path) for path in (submission.data, submission.recipe) if path is not None]
    return ["sh", "-c", _SCRIPT, "sh", *paths]


def docker_preflight(
    submission: Submission, hosts: Sequence[str], reach: Reach, options: LaunchOptions
) -> PreflightReport:
    """What is found on all hosts, asked at once; nothing is started or written."""
    command = probe_command(submission)
    completed = ask_all({host: reach(host, command) for host in hosts}, "", _ANSWER_SECONDS)
    return PreflightReport(
        {host: list(judge(host, of, submission, options)) for host, of in completed.items()}, None
    )


def judge(
    host: str,
    completed: subprocess.CompletedProcess[str] | None,
    submission: Submission,
    options: LaunchOptions,
) -> Iterator[Finding]:
    """The findings about one host, from what its shell said."""
    if completed is None or completed.returncode == SSH_FAILED:
        yield Finding("reached", "wrong", explain_failure(host, completed, options))
        return
    yield Finding("reached", "ok", host)
    said = [line.partition(" ")[::2] for line in completed.stdout.splitlines()]
    server = next((value for key, value in said if key == "server" and value), None)
    if completed.returncode or server is None:
        yield Finding(
            "Docker", "wrong", explain(submission, completed.returncode, completed.stderr.splitlines())
        )
        return
    yield Finding("Docker", "ok", server)
    if submission.device == "cuda":
        if way := next((value for key, value in said if key == "gpus"), None):
            yield Finding("GPUs", "ok", f"by {way}")
        else:
            fix = "install the NVIDIA Container Toolkit there, or use --device cpu"
            yield Finding(
                "GPUs", "wrong", "Docker there has neither NVIDIA's runtime nor its CDI devices", fix
            )
    missing = [value for key, value in said if key == "missing"]
    for path in missing:
        yield Finding(
            "data", "wrong", f"no readable {path} there", "it has to be at the same path on all hosts"
        )
    if not missing and submission.data:
        yield Finding("data", "ok", f"{submission.data}")
