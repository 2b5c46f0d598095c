"""The network interfaces that a user lets NCCL use: NCCL_SOCKET_IFNAME, in the environment or a file of NCCL's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

NAME = "NCCL_SOCKET_IFNAME"


def socket_interfaces(environment: Mapping[str, str]) -> str | None:
    """What is said, in NCCL's own order: the environment, the user's file, /etc/nccl.conf; None for nothing."""
    if NAME in environment:
        return environment[NAME]
    own = environment.get("NCCL_CONF_FILE") or f"{environment.get('HOME', '')}/.nccl.conf"
    for file in (own, "/etc/nccl.conf"):
        try:
            found = re.findall(rf"^\s*{NAME}\s*=(.*)$", Path(file).read_text(errors="replace"), re.MULTILINE)
        except OSError:
            continue
        if found:
            return str(found[-1]).strip()
    return None


def allows(said: str, interface: str) -> bool:
    """Whether `said` lets NCCL use an interface: beginnings of names, with = whole names, with ^ all but these."""
    but = said.startswith("^")
    whole = said.removeprefix("^").startswith("=")
    names = [name.partition(":")[0] for name in said.lstrip("^=").split(",") if name]
    named = any(interface == name if whole else interface.startswith(name) for name in names)
    return named != but if names else True
