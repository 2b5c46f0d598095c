"""The command lines by which containers become the hosts of a run, and what their failures mean.

User strings are arguments, never parts of a script; over ssh a whole command line is quoted once. Nothing secret is
among them: keys and variables go through the container's standard input (hvd_lb.launch.submit.docker.host).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hvd_lb.launch.submit.command import Submission

#: Of Docker's default of 64 MB, NCCL alone needs more for 8 GPUs. An upper bound: what is not used costs nothing.
SHARED_MEMORY = "8g"
LABEL = "hvd-lb.run"

#: Shell functions: whether Docker gives containers GPUs by NVIDIA's runtime, or as CDI devices.
FIND_GPUS = (
    "runtime() { command -v nvidia-container-runtime-hook >/dev/null || "
    'docker info --format "{{json .Runtimes}}" | grep -qw nvidia; }; '
    "cdi() { grep -qs nvidia.com/gpu /etc/cdi/* /var/run/cdi/* || "
    'docker info --format "{{json .}}" | grep -q nvidia.com/gpu=; }; '
)
# Arguments: the output, and those of `docker run`. The output is made by who starts the container, and belongs to them;
# inside, too, they have their groups, through which they may read the data. InfiniBand is used where the host has it.
# All in one line, as --dry-run shows it.
_PREPARE = (
    'mkdir -p -- "$1" || exit; shift; for group in $(id -G); do set -- --group-add "$group" "$@"; done; '
    'if [ -d /dev/infiniband ]; then set -- --device /dev/infiniband "$@"; fi; '
)
_ASK_FOR_GPUS = (
    'if ! runtime && cdi; then set -- --device nvidia.com/gpu=all "$@"; else set -- --gpus all "$@"; fi; '
)
_RUN = 'exec docker run --user "$(id -u):$(id -g)" "$@"'
_HOST_PROCESS = ("python", "-m", "hvd_lb.launch.submit.docker.host")


def run_command(submission: Submission, run: str, host: str) -> list[str]:
    """What is run on `host` to start its container of the run `run`: it lives as long as its standard input.

    Data, recipe file and output, absolute paths all of them, are at the same places inside as outside.
    """
    if submission.image is None:
        raise ValueError("a submission without an image has no containers")
    gpus = FIND_GPUS + _ASK_FOR_GPUS if submission.device == "cuda" else ""
    mounts = ["--mount", _mount(submission.output, read_only=False)]
    for path in (submission.data, submission.recipe):
        if path is not None:
            mounts += ["--mount", _mount(path, read_only=True)]
    return [
        *("sh", "-c", _PREPARE + gpus + _RUN, "sh", str(submission.output)),
        *("--rm", "--interactive", "--name", container_name(run, host), "--label", f"{LABEL}={run}"),
        *("--network", "host", "--shm-size", SHARED_MEMORY),
        *("--ulimit", "memlock=-1", "--ulimit", "stack=67108864"),
        *("--security-opt", "no-new-privileges", "--log-driver", "none"),
        *mounts,
        *("--entrypoint", "hvd-lb-entry", submission.image, *_HOST_PROCESS),
    ]


def remove_command(run: str, host: str) -> list[str]:
    """What is run on `host` when its container did not end by itself."""
    return ["docker", "rm", "--force", container_name(run, host)]


def container_name(run: str, host: str) -> str:
    return f"hvd-lb-{run}-{re.sub('[^A-Za-z0-9_.-]', '-', host)}"


def inner_command(submission: Submission, hosts: Sequence[tuple[str, int]]) -> list[str]:
    """What is run in the first container: the same run over the sshd of all of them."""
    return [
        *("hvd-lb", *submission.arguments, "--launcher", "ssh"),
        *("--hosts", ",".join(f"{name}:{slots}" for name, slots in hosts)),
        *("--ssh-port", str(submission.container_port), "--strict-host-keys"),
    ]


def known_host(name: str, port: int, key: str) -> str:
    """The line of a known_hosts file for the sshd on a port of a host."""
    return f"{name if port == 22 else f'[{name}]:{port}'} {key}"


def _mount(path: Path, *, read_only: bool) -> str:
    """A value of --mount, which is read as a line of CSV. Unlike -v it does not make a folder that is missing."""
    fields = ["type=bind", f"source={path}", f"target={path}", *(["readonly"] if read_only else [])]
    return ",".join(
        '"' + field.replace('"', '""') + '"' if set(field) & set(',"\r\n') else field for field in fields
    )


# What `docker run`, ssh and the host process say when a container does not come to life, and what to do then.
_MEANINGS = (
    (r"docker: (?:command )?not found", "no docker there: install Docker Engine"),
    (r"permission denied while trying to connect", "no permission to use Docker: add the user to the group `docker`"),
    (r"[Cc]annot connect to the Docker daemon|failed to connect to the docker API", "the Docker daemon does not run: "
     "systemctl start docker"),
    (r"Unable to find image", "no image {image} there and none to pull: check its name, or `docker pull` or `docker "
     "load` it there ({last})"),
    (r"nvidia.com/gpu=all", "Docker there uses no CDI devices: set the feature `cdi` in /etc/docker/daemon.json, or "
     "install the NVIDIA Container Toolkit's runtime ({last})"),
    (r"could not select device driver|nvidia-container-cli|[Uu]nknown runtime", "Docker cannot give it GPUs: install "
     "the NVIDIA Container Toolkit and driver, or use --device cpu ({last})"),
    (r"(?m)bind source path does not exist: (?P<path>.*?)\.?$", "no {path} there: it has to be at the same path on "
     "all hosts"),
    (r"mkdir: .*", "the output folder cannot be made: {last}"),
    (r"No module named 'hvd_lb|Error while finding module specification", "{image} has another hvd-lb: use the image "
     "of this version"),
    (r"\"?hvd-lb-entry\"?: (?:executable file not found|no such file)", "{image} is no image of hvd-lb"),
    (r"port (?P<port>\d+) cannot be listened on: .*in use", "port {port} is in use there: is another run on that host? "
     "`docker ps --filter label=" + LABEL + "` shows it"),
)  # fmt: skip


def explain(submission: Submission, status: int, said: Sequence[str]) -> str:
    """Why a container ended, in one line: by its exit status and the last lines it wrote to standard error."""
    text = "\n".join(said)
    lines = [
        line for line in said if line.strip() and not line.startswith(("See 'docker run", "Run 'docker run"))
    ]
    last = (
        re.sub(r"^(?:docker|hvd-lb|sh): (?:Error response from daemon: )?", "", lines[-1].strip())
        if lines
        else ""
    )
    for pattern, meaning in _MEANINGS:
        if match := re.search(pattern, text):
            return meaning.format(image=submission.image, last=last, **match.groupdict())
    if status == 255:
        return f"its ssh connection failed: {last or 'no reason given'}"
    if status == 137:
        return "its container was killed by hand, or for memory"
    return last or f"its container ended with exit code {status}"
