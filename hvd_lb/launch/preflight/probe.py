"""What a host says of itself before a run: `python -m hvd_lb.launch.preflight.probe NAME`.

It is asked on stdin and answers on stdout, both in JSON, in a second or two: nothing heavy is imported. `ask` asks all
hosts, `judge` judges. NAME is what the asker calls this host; in a Slurm job it may be left out.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Sequence, Set
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from hvd_lb.machine import nccl
from hvd_lb.machine.cpu import describe_cpu, usable_cores
from hvd_lb.machine.gpus import SHOWN_BY, gpus
from hvd_lb.machine.packages import COMPUTING

#: Begins the line that is the answer, among whatever else a login shell may print.
ANSWER = "hvd-lb-probe "
#: Variables of a run by which a host has to be asked; the ranks will have them.
ASKED_BY = (*SHOWN_BY, nccl.NAME)
# By these no other host knows this one.
_OWN_NAMES = ("localhost", "127.0.0.1")
_PACKAGES = ("hvd-lb", "horovod", *COMPUTING)


def answer(name: str, request: dict[str, Any]) -> dict[str, Any]:
    """`request`: hosts (all their names), interface (a name or None), grows (whether others may join them), data (a
    folder or None), marker (a file), environment (those of the run's variables that are in ASKED_BY).
    """
    environment = {**os.environ, **request["environment"]}
    towards = peers(request["hosts"], {name}, grows=request["grows"])
    towards_peers = interface(request["interface"], towards, nccl.socket_interfaces(environment))
    return {
        "name": name,
        "hostname": socket.gethostname(),
        "identity": identity(),
        "versions": versions(),
        "horovod": horovod_build(),
        "mpirun": shutil.which("mpirun"),
        "nameless": unknown_to_itself(alone=towards_peers.get("address", "127.").startswith("127.")),
        "cores": usable_cores(),
        "cpu": describe_cpu(),
        "gpus": gpus(environment),
        "interface": towards_peers,
        "data": None if request["data"] is None else os.access(request["data"], os.R_OK | os.X_OK),
        "output": shares(request["marker"], name),
    }


def versions() -> dict[str, str]:
    """Versions that have to be the same on all hosts; "none" for what is not there."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = "none"
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def horovod_build() -> dict[str, Any]:
    """What docker/build-horovod.sh recorded of the installed Horovod, without its paths; empty for another one."""
    spec = importlib.util.find_spec("horovod")
    if spec is None or spec.origin is None:
        return {}
    record = Path(spec.origin).with_name("hvd_lb_build.json")
    built = json.loads(record.read_text()) if record.is_file() else {}
    return {name: built.get(name) for name in ("torch", "gloo", "mpi", "nccl")} if built else {}


def unknown_to_itself(*, alone: bool = True) -> str | None:
    """Why processes that look up the name of their own host would fail; None when they would not.

    Gloo's end with a SIGSEGV where it has no address. Where it is a loopback address, as Debian sets it up, those of
    other hosts cannot connect: Horovod opens a second set of connections by it, whatever interface it was told.
    """
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return f"its own name, {name}, has no address: put it into /etc/hosts there"
    if not alone and ipaddress.ip_address(str(address).partition("%")[0]).is_loopback:
        return (
            f"its own name, {name}, is a loopback address there ({address}), where Horovod's processes on other hosts "
            "would look for it: give it the address of its network in /etc/hosts"
        )
    return None


def identity() -> str | None:
    """The same for two names of a machine, and for no two machines, containers or pods; None where it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return " ".join([boot, socket.gethostname(), *sorted(_addresses().values())])


def _addresses() -> dict[str, str]:
    """The IPv4 address of each network interface that has one."""
    import psutil

    return {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }


def peers(hosts: Sequence[str], own: Set[str], *, grows: bool) -> list[str]:
    """Whom a machine that has these names has to reach; where others may join it later, by how they will reach it."""
    others = [host for host in hosts if host not in own]
    return others or [host for host in hosts if grows and host not in _OWN_NAMES]


def interface(wanted: str | None, peers: list[str], for_nccl: str | None = None) -> dict[str, Any]:
    """The network interface that reaches the peers: {"name", "address", "unreached": {peer: why}}, or {"problem"}.

    `wanted` asks for one by name, and `for_nccl` is NCCL_SOCKET_IFNAME, which decides where nobody does. Without other
    hosts it is the one of this machine's own traffic, the loopback.
    """
    addresses = _addresses()
    own: dict[str, str] = {}
    unreached: dict[str, str] = {}
    for peer in peers or ["127.0.0.1"]:
        try:
            own[peer] = address_towards(peer)
        except OSError as error:
            unreached[peer] = f"{peer} cannot be reached from it ({error.strerror or error})"
        else:
            if peers and own[peer].startswith("127."):
                why = (
                    "see its /etc/hosts"
                    if peer not in _OWN_NAMES
                    else "name that host as the others reach it"
                )
                unreached[peer] = f"{peer} is a loopback address there: {why}"
    own_choice = wanted is None
    if wanted is None:
        towards = next((address for peer, address in own.items() if peer not in unreached), "127.0.0.1")
        wanted = next((name for name, address in addresses.items() if address == towards), None)
    if peers and for_nccl is not None:
        allowed = [name for name in addresses if nccl.allows(for_nccl, name)]
        if not allowed:
            there = ", ".join(sorted(addresses))
            return {
                "problem": f"{nccl.NAME}={for_nccl} leaves none of its interfaces with an IPv4 address: {there}"
            }
        if own_choice and wanted not in allowed:
            wanted = allowed[0]
    if wanted not in addresses:
        return {
            "problem": f"no interface {wanted or ''} with an IPv4 address, only {', '.join(sorted(addresses))}"
        }
    return {"name": wanted, "address": addresses[wanted], "unreached": unreached}


def address_towards(peer: str) -> str:
    """This machine's IPv4 address as `peer` would see it. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return str(probe.getsockname()[0])


def shares(marker: str, name: str) -> dict[str, Any]:
    """Whether the asker's marker file is seen here, and a file can be written beside it: its name ends with ours."""
    path = Path(marker)
    if not path.parent.is_dir():
        return {"problem": f"no folder {path.parent} there"}
    if not path.exists():
        return {"problem": f"{path.parent} is another folder than here"}
    try:
        path.with_name(f"{path.name}.{name}").touch()
    except OSError as error:
        return {"problem": f"{path.parent} cannot be written there ({error.strerror})"}
    return {}


def parse(line: str) -> dict[str, Any]:
    """The answer in the line that begins with ANSWER."""
    answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
    return answer


if __name__ == "__main__":
    own_name = sys.argv[1] if len(sys.argv) > 1 else os.environ["SLURMD_NODENAME"]
    print(ANSWER + json.dumps(answer(own_name, json.loads(sys.stdin.readline()))), flush=True)
