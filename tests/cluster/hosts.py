"""A lab: several hosts with a network, a name and an sshd each, in namespaces of this machine. Needs root.

with lab(["h1", "h2", "h3"]) as hosts:
    hosts[0].run(["ssh", "-p", "12345", "h2", "hostname"])

All hosts see this machine's files, but each has its own processes, /dev/shm and mounts. Their network is theirs alone:
nothing outside reaches it, it reaches nothing outside, and several labs do not meet. No namespace has a name, so
each ends with its first process, which ends with the test's process, however that ends: nothing is ever left.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from real_runs import until

from hvd_lb.machine.cpu import cpu_features, cpu_info

PORTS = (22, 12345)
NETWORK = "10.77.0"
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
_TOOLS = ("ip", "nsenter", "ssh", "ssh-keygen", "sshd", "tc", "unshare")
_PR_SET_PDEATHSIG, _CLONE_NEWPID = 1, 0x20000000
_libc = ctypes.CDLL(None, use_errno=True)


def missing() -> str | None:
    """Why there can be no lab here."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a lab of hosts needs root on Linux"
    if absent := [tool for tool in _TOOLS if not shutil.which(tool, path=_PATH)]:
        return f"a lab of hosts needs {', '.join(absent)}: apt-get install iproute2 openssh-server openssh-client"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], stderr=subprocess.DEVNULL
    )
    return "this machine allows no namespaces" if probe.returncode else None


@contextmanager
def lab(names: Sequence[str]) -> Iterator[list[Host]]:
    """Hosts with these names; the test is skipped where there can be none."""
    if reason := missing():
        pytest.skip(reason)
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="lab-", ignore_cleanup_errors=True))
        )
        folder.chmod(0o755)
        switch = _Namespaces()
        stack.callback(switch.kill)
        switch.ip("link", "add", "br0", "type", "bridge")
        switch.ip("link", "set", "br0", "up")
        addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, 1)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        _new_key(folder / "key")
        hosts = [Host(name, addresses[name], folder / name, switch) for name in names]
        for host in hosts:
            stack.callback(host.kill)
            host.boot()
        yield hosts


class Host:
    """One host of a lab, once booted. `key` opens every host to root."""

    def __init__(self, name: str, address: str, folder: Path, switch: _Namespaces):
        self.name, self.address, self.folder = name, address, folder
        self.key = folder.parent / "key"
        self.known_hosts = folder / "known_hosts"
        self._switch = switch
        self._authorized = folder / "authorized_keys"
        (folder / "empty").mkdir(parents=True)
        _new_key(folder / "host_key")
        (folder / "ssh_config").write_text(
            f"IdentityFile {self.key}\nUserKnownHostsFile {self.known_hosts}\nBatchMode yes\nConnectTimeout 10\n"
        )
        self.accept_key()

    def boot(self, **variables: str) -> None:
        """Start it, also again after `kill`; what was hidden is there again. Logins have these `variables`."""
        # An sshd gives its own environment to nobody; the code that is tested may be that of a path in it.
        paths = {"PYTHONPATH": path} if (path := os.environ.get("PYTHONPATH")) else {}
        set_env = " ".join(f"{name}={value}" for name, value in {**paths, **variables}.items())
        (self.folder / "sshd_config").write_text(
            "".join(f"Port {port}\n" for port in PORTS)
            + f"HostKey {self.folder}/host_key\nPidFile {self.folder}/sshd.pid\n"
            f"AuthorizedKeysFile {self._authorized}\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "PermitRootLogin prohibit-password\nUseDNS no\n" + (f"SetEnv {set_env}\n" if set_env else "")
        )
        self._namespaces = _Namespaces(
            f"hostname {self.name}",
            f"mount --bind {self.folder.parent}/hosts /etc/hosts",
            f"mount --bind {self.folder}/ssh_config /etc/ssh/ssh_config",
            "mount -t tmpfs tmpfs /dev/shm",
        )
        net, switch = self._namespaces, self._switch
        with suppress(subprocess.CalledProcessError):  # it goes with its other end, a moment after a kill
            switch.ip("link", "del", self.name)
        # The same hardware address after each boot: the others remember it.
        mac = f"02:00:00:00:00:{int(self.address.rpartition('.')[2]):02x}"
        peer = ("peer", "name", self.name, "netns", str(switch.pid))
        net.ip("link", "add", "eth0", "address", mac, "type", "veth", *peer)
        switch.ip("link", "set", self.name, "master", "br0", "up")
        net.ip("addr", "add", f"{self.address}/24", "dev", "eth0")
        net.ip("link", "set", "eth0", "up")
        net.ip("link", "set", "lo", "up")
        Path("/run/sshd").mkdir(exist_ok=True)
        sshd = self.start(
            [_tool("sshd"), "-D", "-e", "-f", f"{self.folder}/sshd_config"], stderr=subprocess.DEVNULL
        )
        until(lambda: (self.folder / "sshd.pid").exists() or sshd.poll() is not None, 30, every=0.05)
        if sshd.poll() is not None:
            raise RuntimeError(f"sshd of {self.name} ended with {sshd.returncode}")

    def kill(self) -> None:
        """All its processes at once, as when the power fails."""
        (self.folder / "sshd.pid").unlink(missing_ok=True)
        self._namespaces.kill()

    def start(
        self, command: Sequence[object], *, env: Mapping[str, str] | None = None, **settings: Any
    ) -> subprocess.Popen[str]:
        """The command on this host; signals reach it as any other child."""
        return self._namespaces.start(
            [str(part) for part in command], env={**os.environ, "PATH": _PATH, **(env or {})}, **settings
        )

    def run(
        self,
        command: Sequence[object],
        *,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout: float = 120,
        input: str | None = None,
        **settings: Any,
    ) -> subprocess.CompletedProcess[str]:
        """What the command did on this host; a test fails when it fails (see `check`) or takes too long."""
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        pipe = subprocess.PIPE
        process = self.start(command, env=env, stdin=stdin, stdout=pipe, stderr=pipe, **settings)
        try:
            out, err = process.communicate(input, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                out, err = process.communicate(timeout=5)
                pytest.fail(f"after {timeout} s {command} was still running on {self.name}:\n{out}\n{err}")
            pytest.fail(f"after {timeout} s {command} was still running on {self.name}")
        if check and process.returncode:
            pytest.fail(f"{command} on {self.name} ended with {process.returncode}:\n{out}\n{err}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def cut(self) -> None:
        """Its network is gone without a word."""
        self._switch.ip("link", "set", self.name, "down")

    def fix(self) -> None:
        self._switch.ip("link", "set", self.name, "up")

    def slow_down(self, rate: str) -> None:
        """What it sends, such as "1gbit"."""
        shape = f"qdisc replace dev eth0 root tbf rate {rate} burst 32kb latency 50ms"
        self._namespaces.net([_tool("tc"), *shape.split()])

    def replace(self, path: Path, by: Path) -> None:
        """Let `by` stand for the existing `path` on this host alone; both folders or both files."""
        self.run(["mount", "--bind", by, path])

    @contextmanager
    def with_another_cpu(self) -> Iterator[str]:
        """Meanwhile its CPU is said to lack a feature, whose name is given."""
        feature = cpu_features()[0]
        (self.folder / "cpuinfo").write_text(re.sub(rf"\b{feature}\b", "", cpu_info()))
        self.replace(Path("/proc/cpuinfo"), self.folder / "cpuinfo")
        try:
            yield feature
        finally:
            self.put_back(Path("/proc/cpuinfo"))

    def hide(self, folder: Path) -> None:
        """The folder is empty on this host alone."""
        self.replace(folder, self.folder / "empty")

    def put_back(self, path: Path) -> None:
        """End what `replace` or `hide` did."""
        self.run(["umount", path])

    def accept_key(self) -> None:
        shutil.copyfile(f"{self.key}.pub", self._authorized)

    def refuse_key(self) -> None:
        self._authorized.write_text("")

    def change_host_key(self) -> None:
        """As a host that was set up anew, or another one under its name."""
        _new_key(self.folder / "host_key")
        self.run(["kill", "-HUP", (self.folder / "sshd.pid").read_text().strip()])
        key = (self.folder / "host_key.pub").read_text().split()[1]
        until(
            lambda: key in self.run(["ssh-keyscan", "-T", "1", "localhost"], check=False).stdout, every=0.05
        )

    def know(self, *others: Host) -> None:
        """Enter the others' keys, as they are now, as known."""
        entries = []
        for other in others:
            key = " ".join((other.folder / "host_key.pub").read_text().split()[:2])
            for name in (other.name, other.address):
                entries += [f"{name} {key}\n", *(f"[{name}]:{port} {key}\n" for port in PORTS if port != 22)]
        with self.known_hosts.open("a") as file:
            file.writelines(entries)


class _Namespaces:
    """Network, host name, mounts and processes of their own, with a first process that keeps them."""

    def __init__(self, *preparations: str):
        # The shell is a proper first process: while it waits for `sleep` it also buries orphans.
        script = "; ".join(["set -e", *preparations, "echo ready", "sleep infinity", "exit"])
        self._keeper = subprocess.Popen(
            [
                *("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-c", script),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PATH": _PATH},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != "ready\n":
            raise RuntimeError(f"could not make a host's namespaces: {preparations}")
        children = Path(f"/proc/{self._keeper.pid}/task/{self._keeper.pid}/children")
        self.pid = int(children.read_text().split()[0])

    def start(self, command: Sequence[str], **settings: Any) -> subprocess.Popen[str]:
        """Popen with a child in these namespaces.

        nsenter would fork into the namespace of processes and not hand signals on, so it is this thread that goes
        there for the time of its own fork.
        """
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--wdns=" + os.getcwd()]
        with open(f"/proc/{self.pid}/ns/pid") as there, open("/proc/self/ns/pid") as here:
            _set_namespace(there.fileno())
            try:
                return subprocess.Popen([*enter, *command], text=True, **settings)
            finally:
                _set_namespace(here.fileno())

    def net(self, command: Sequence[str]) -> None:
        """Run a command in the network alone, among this machine's processes."""
        enter = ["nsenter", f"--target={self.pid}", "--net"]
        subprocess.run([*enter, *command], check=True, capture_output=True, timeout=30)

    def ip(self, *arguments: str) -> None:
        self.net([_tool("ip"), *arguments])

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with self._keeper:  # also when it was killed before
            self._keeper.kill()


def _set_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWPID) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _tool(name: str) -> str:
    return shutil.which(name, path=_PATH) or name


def _new_key(file: Path) -> None:
    file.unlink(missing_ok=True)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(file)],
        check=True,
        stdin=subprocess.DEVNULL,
        timeout=30,
    )
