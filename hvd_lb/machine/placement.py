"""What this machine offers, and how a run uses it: device, processes, threads. None of it touches the mathematics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hvd_lb.errors import UserError
from hvd_lb.machine.cpu import usable_cores

DeviceName = Literal["cpu", "cuda"]

#: How to get more of them, where no scheduler gives them.
NAME_MORE = "name more machines with --hosts"


@dataclass(frozen=True)
class Placement:
    """`processes` (p) on `device`, each with `threads` CPU threads; `hosts` is empty for this machine alone.

    What other hosts have is known from the preflight: `gpus` are the names of the ranks' GPUs in their order,
    `first_host` is the `describe_cpu` of rank 0's host, `hardware` what `computes_by` gives of each.
    """

    device: DeviceName
    processes: int
    threads: int
    hosts: tuple[str, ...] = ()
    pin: bool = True  #: each process to its share of its host's cores
    gpus: tuple[str, ...] = ()
    first_host: Mapping[str, Any] = field(default_factory=dict)
    hardware: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def gpus_here() -> int:
    """CUDA GPUs that this process sees."""
    import torch  # here: who only names a device or a placement needs no torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_device(name: str, more: str = NAME_MORE) -> DeviceName:
    """cpu or cuda for "auto", "cpu" or "cuda"; `more` says in a UserError how to get GPUs."""
    if name == "auto":
        return "cuda" if gpus_here() else "cpu"
    if name == "cuda" and not gpus_here():
        raise UserError(
            f"--device cuda, but this machine has 0 CUDA GPUs: {more}, use --device cpu, try it out with "
            "`hvd-lb simulate`, or see `hvd-lb doctor` if there should be one"
        )
    return "cuda" if name == "cuda" else "cpu"


def default_gpus(device: DeviceName) -> int:
    """Virtual workers where nobody said how many: one per GPU of this machine."""
    return gpus_here() if device == "cuda" else 1


def choose_placement(
    device: DeviceName,
    *,
    gpus: int,
    processes: int | None,
    threads: int | None,
    group: int = 1,
    more: str = NAME_MORE,
) -> Placement:
    """Processes and threads for `gpus` virtual workers on this machine; UserError, with `more`, if it has too few.

    No process gets less than a `group` of them.
    """
    groups = -(-gpus // group)
    if device == "cuda":
        there = gpus_here()
        wanted = processes or groups
        if wanted > there:
            raise UserError(
                f"{wanted} GPUs are asked for and this machine has {there}: {more}, share "
                f"the virtual workers with --processes {there}, use --device cpu, or try it out with `hvd-lb simulate`"
            )
    else:
        wanted = processes or min(groups, usable_cores())
    check_processes(wanted, gpus, group)
    return Placement(device, wanted, threads or max(1, usable_cores() // wanted))


def check_processes(processes: int, gpus: int, group: int = 1) -> None:
    """UserError when so many processes cannot share the virtual workers, of which a `group` stays together."""
    groups = -(-gpus // group)
    if not 1 <= processes <= groups:
        workers = f"{gpus} virtual workers" + (
            f", with --reproducible --together {group}" if group > 1 else ""
        )
        least = "one" if group == 1 else f"a group of {group}"
        raise UserError(
            f"--processes {processes} for {workers}: expected 1 to {groups}, as each process hosts at least {least}"
        )


def loader_threads(wanted: int | None, threads: int, cores: int, *, reproducible: bool) -> int:
    """Threads that read and decode for a process that computes with `threads` and has `cores` for itself.

    As many as are `wanted`; no pixel depends on it. So where nothing is said and a reproducible run fixes the threads
    of computing, decoding still gets its share of the cores.
    """
    if wanted:
        return wanted
    return max(threads, cores) if reproducible else threads
