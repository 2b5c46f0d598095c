"""A real Docker engine and the real image, for tests. Needs root, dockerd and debootstrap; no image is pulled.

with engine() as docker:
    image = docker.build_image()
    with docker.on(hosts):  # a lab's: `docker` there starts containers in the host's network
        hosts[0].run(["docker", "run", "--network", "host", image, "doctor"])

What was built stays in $HVD_LB_CACHE/engine, so the image is built anew only where something has changed; all else, the
daemon and every container, ends with the test's process.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hosts import Host
from real_runs import until

from hvd_lb.machine.cache_folder import cache_folder

IMAGE = "localhost/hvd-lb"
SUITE = "bookworm"
_ROOT = Path(__file__).parents[2]
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
_CERTIFICATES = Path("/usr/local/share/ca-certificates")
_PR_SET_PDEATHSIG = 1
_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"


def missing() -> str | None:
    """Why there can be no engine here."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Docker engine of its own needs root on Linux"
    absent = [tool for tool in ("docker", "dockerd", "debootstrap") if not shutil.which(tool, path=_PATH)]
    return f"no {', '.join(absent)}: apt-get install docker.io debootstrap" if absent else None


@contextmanager
def engine() -> Iterator[Engine]:
    """A running dockerd with the kept images; the test is skipped where there can be none."""
    if reason := missing():
        pytest.skip(reason)
    kept = cache_folder() / "engine"
    kept.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = stack.enter_context((kept / "lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # one daemon at a time
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="engine-")))
        log = stack.enter_context((folder / "log").open("w"))
        daemon = subprocess.Popen(
            [
                *("unshare", "--mount"),  # its mounts end with it
                *("dockerd", f"--data-root={kept}/data", f"--exec-root={folder}/exec"),
                *(f"--pidfile={folder}/pid", f"--host=unix://{folder}/sock", "--bridge=none"),
                *("--iptables=false", "--ip-forward=false"),
            ],
            stdout=log,
            stderr=log,
            env={**os.environ, "PATH": _PATH},
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        docker = Engine(folder)
        try:
            until(lambda: docker.answers() or daemon.poll() is not None, 60)
            if daemon.poll() is not None:
                pytest.fail(
                    f"dockerd ended with {daemon.returncode}:\n{(folder / 'log').read_text()[-2000:]}"
                )
            docker.remove_containers()
            yield docker
            docker.remove_containers()
        finally:
            daemon.terminate()
            daemon.wait(60)


class Engine:
    """Docker's command line for one daemon."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": _PATH,
            "DOCKER_HOST": f"unix://{folder}/sock",
            "DOCKER_BUILDKIT": "0",  # it would have to be pulled
        }

    def __call__(
        self, *arguments: object, check: bool = True, **settings: Any
    ) -> subprocess.CompletedProcess[str]:
        command = ["docker", *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, **settings)
        if check and done.returncode:
            pytest.fail(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
        return done

    def answers(self) -> bool:
        return self("info", check=False).returncode == 0

    def containers(self, label: str = "hvd-lb.run") -> list[str]:
        """The names of those of `--image`, running or not."""
        return self("ps", "--all", "--filter", f"label={label}", "--format", "{{.Names}}").stdout.split()

    def remove_containers(self) -> None:
        if ids := self("ps", "--all", "--quiet").stdout.split():
            self("rm", "--force", *ids)

    def build_image(self) -> str:
        """The image of the Dockerfile as it is, on a base made here; its name."""
        base = self._base()
        build = ("build", "--quiet", "--network=host", f"--build-arg=BASE_IMAGE={base}")
        # A name for the big stage keeps it for the next time; what is left without a name is of older builds.
        self(*build, "--target=libraries", f"--tag={IMAGE}-libraries", _ROOT, timeout=3600)
        self(*build, f"--tag={IMAGE}", _ROOT, timeout=3600)
        self("image", "prune", "--force")
        return IMAGE

    def _base(self) -> str:
        """A bare Debian, without Python, that reaches the package indexes as this machine does."""
        files = machine_files()
        digest = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
        name = f"localhost/debian:{digest[:12]}"
        if self("image", "inspect", name, check=False).returncode == 0:
            return name
        with tempfile.TemporaryDirectory(prefix="debian-") as folder:
            root = Path(folder)
            command = [
                "debootstrap",
                "--variant=minbase",
                "--include=ca-certificates",
                SUITE,
                folder,
                mirror(),
            ]
            subprocess.run(command, check=True, env=self.environment, stdout=subprocess.DEVNULL, timeout=1200)
            for place, text in files.items():
                path = root / place.lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            subprocess.run(["chroot", folder, "update-ca-certificates"], check=True, capture_output=True)
            with subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE) as archive:
                self("import", "-", name, stdin=archive.stdout)
        return name

    @contextmanager
    def on(self, hosts: Sequence[Host], user: str | None = None) -> Iterator[None]:
        """On each host of the lab `docker` is this engine's, and the host's network is what it calls the host's.

        Root is root on all of them; `user` as "UID:GID" says who it is to Docker instead.
        """
        real = self.folder / "docker"
        shutil.copy(str(shutil.which("docker", path=_PATH)), real)
        names = [f"--add-host={host.name}:{host.address}" for host in hosts]
        for host in hosts:
            resident = host.start(["sleep", "infinity"])
            self(
                *(
                    "run",
                    "--detach",
                    "--rm",
                    "--name",
                    f"network-of-{host.name}",
                    "--hostname",
                    host.name,
                    *names,
                ),
                *("--cap-add=SYS_ADMIN", "--cap-add=SYS_PTRACE", "--security-opt=seccomp=unconfined"),
                *("--pid=host", "--network=none", self._base()),
                *("nsenter", f"--net=/proc/{resident.pid}/ns/net", "sleep", "infinity"),
            )
            stand_in = self.folder / f"docker-of-{host.name}"
            stand_in.write_text(
                _STAND_IN.format(
                    python=sys.executable,
                    real=str(real),
                    socket=self.environment["DOCKER_HOST"],
                    network=f"container:network-of-{host.name}",
                    user=user,
                )
            )
            stand_in.chmod(0o755)
            for place in _all_of("docker"):
                host.replace(place, stand_in)
        yield
        for host in hosts:
            for place in _all_of("docker"):
                host.put_back(place)
        self("rm", "--force", *(f"network-of-{host.name}" for host in hosts))


# In a sandbox, root may not lift the limit on locked memory.
_STAND_IN = """#!{python} -IS
import os, sys
words = sys.argv[1:]
if words[:1] == ["run"]:
    words[words.index("--network") + 1] = {network!r}
    limit = words.index("memlock=-1")
    del words[limit - 1 : limit + 1]
    words[words.index("--user") + 1] = {user!r} or words[words.index("--user") + 1]
os.environ["DOCKER_HOST"] = {socket!r}
os.execv({real!r}, ["docker", *words])
"""


def mirror() -> str:
    """Where this machine gets its Debian packages."""
    wanted = ("--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {SUITE}", "Component: main")
    found = subprocess.run(["apt-get", "indextargets", *wanted], capture_output=True, text=True)
    return next(iter(found.stdout.split()), "http://deb.debian.org/debian")


def machine_files() -> dict[str, str]:
    """What a Debian needs to reach the package indexes as this machine does: certificates, settings of pip and apt."""
    files = {str(path): path.read_text() for path in sorted(_CERTIFICATES.glob("*.crt"))}
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    settings = {"cert": _BUNDLE}
    for key, value in re.findall(r"^(?:global|install|:env:)\.(\S+?)='(.*)'$", listed, re.MULTILINE):
        if key in ("index-url", "extra-index-url", "trusted-host", "proxy") and "file:" not in value:
            settings[key] = value
    files["/etc/pip.conf"] = "[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())
    listed = subprocess.run(["apt-config", "dump"], capture_output=True, text=True).stdout
    ways = re.findall(r"^Acquire::(?:https?::|Check-).*$", listed, re.MULTILINE)
    files["/etc/apt/apt.conf.d/90machine"] = "\n".join([*ways, ""])
    return files


def _all_of(program: str) -> list[Path]:
    """Every place where it lies on the path, links resolved."""
    places = (Path(folder, program) for folder in _PATH.split(":"))
    return list(dict.fromkeys(place.resolve() for place in places if place.is_file()))


def _end_with_parent() -> None:
    """dockerd ends its containers and helpers when asked to, and not when killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
