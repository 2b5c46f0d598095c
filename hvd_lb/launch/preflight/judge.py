"""Before the first process starts: every host is asked at once what it has, and what is wrong is said per host.

Nothing is started, and nothing stays written, unless all of them are ready.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hvd_lb.doctor.finding import Finding
from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host, in_words, is_this_machine
from hvd_lb.launch.preflight import probe
from hvd_lb.launch.preflight.ask import Ask
from hvd_lb.launch.preflight.cluster import Cluster
from hvd_lb.machine.placement import NAME_MORE, DeviceName
from hvd_lb.report.run_directory import PASSING

_ANSWER_SECONDS = 90.0
_GIB = 2**30
_BUSY_BYTES = 2 * _GIB  # more than a driver and a desktop take


@dataclass(frozen=True)
class Request:
    """What a run will need on every host; `data` and `output` are absolute."""

    device: str  #: "auto", "cpu" or "cuda"
    data: Path | None
    output: Path
    interface: str | None
    more: str = NAME_MORE  #: how to get more hosts or GPUs
    environment: Mapping[str, str] = field(
        default_factory=dict
    )  #: that the ranks will have, beside their hosts' own
    running: Mapping[str, int] = field(default_factory=dict)  #: processes that this run has on a host already
    grows: bool = False  #: other hosts may join those that are asked


@dataclass(frozen=True)
class PreflightReport:
    """What was found, per host in the order of the table; `cluster` when all are ready.

    `problems` are sentences, each about all the hosts that have it.
    """

    findings: dict[str, list[Finding]]
    cluster: Cluster | None

    @property
    def problems(self) -> list[str]:
        return [
            f"{in_words(hosts)}: {finding.detail}" + (f"; {finding.fix}" if finding.fix else "")
            for finding, hosts in self.wrong()
        ]

    @property
    def ready_hosts(self) -> set[str]:
        """Those of which everything is right."""
        return {host for host, found in self.findings.items() if all(one.state == "ok" for one in found)}

    def wrong(self) -> list[tuple[Finding, list[str]]]:
        """Findings that are not ok, each with the hosts of which it is true; in it HOST stands for several names."""
        alike: dict[Finding, list[tuple[str, Finding]]] = {}
        for host, found in self.findings.items():
            for finding in found:
                if finding.state != "ok":
                    alike.setdefault(_without_name(finding, host), []).append((host, finding))
        return [
            (common if len(ones) > 1 else ones[0][1], [host for host, _ in ones])
            for common, ones in alike.items()
        ]

    def ready(self) -> Cluster:
        """The cluster; UserError with everything that is wrong."""
        self.refuse()
        if self.cluster is None:
            raise ValueError("a report without problems and without a cluster is not of this preflight")
        return self.cluster

    def refuse(self) -> None:
        """UserError with everything that is wrong, if anything is."""
        if not self.problems:
            return
        wrong = sum(any(f.state != "ok" for f in found) for found in self.findings.values())
        raise UserError(
            f"{wrong} of {len(self.findings)} hosts not ready, nothing was started: {'. '.join(self.problems)}"
        )


def _without_name(finding: Finding, host: str) -> Finding:
    name = re.compile(rf"(?<![\w.-]){re.escape(host)}(?![\w.-])")
    return replace(finding, detail=name.sub("HOST", finding.detail), fix=name.sub("HOST", finding.fix))


def preflight(hosts: Sequence[Host], request: Request, ask: Ask) -> PreflightReport:
    """Ask all hosts at once and judge what they say."""
    names = [host.name for host in hosts]
    with _marker(request.output) as marker:
        question = json.dumps(
            {
                "hosts": names,
                "interface": request.interface,
                "grows": request.grows,
                "data": os.fspath(request.data) if request.data else None,
                "marker": os.fspath(marker),
                "environment": {
                    name: value for name, value in request.environment.items() if name in probe.ASKED_BY
                },
            }
        )
        said = ask(names, question + "\n")
        here = {"versions": probe.versions(), "horovod": probe.horovod_build()}
        own = here["versions"]["hvd-lb"]
        answers = {name: _parse(said.get(name, UserError("it gave no answer")), own) for name in names}
        appeared = {name for name in names if marker.with_name(f"{marker.name}.{name}").exists()}
    device = _device(request.device, answers)
    silent = {name for name, answer in answers.items() if isinstance(answer, UserError)}
    first_names: dict[str, str] = {}
    for name, answer in answers.items():
        if not isinstance(answer, UserError) and answer["identity"]:
            first_names.setdefault(answer["identity"], name)
    findings = {
        host.name: list(
            _judge(
                host, answers[host.name], here, request, device, host.name in appeared, silent, first_names
            )
        )
        for host in hosts
    }
    if any(finding.state != "ok" for found in findings.values() for finding in found):
        return PreflightReport(findings, None)
    ready = {name: answer for name, answer in answers.items() if isinstance(answer, dict)}
    here_too = {name for name in names if is_this_machine(name)}
    own = probe.interface(request.interface, probe.peers(names, here_too, grows=request.grows))
    if (network := _judge_network(own, silent)).state != "ok":
        return PreflightReport({"this machine": [network]}, None)
    return PreflightReport(
        findings,
        Cluster(
            hosts=[_with_slots(host, ready[host.name], device) for host in hosts],
            device=device,
            cores={name: answer["cores"] for name, answer in ready.items()},
            interfaces={name: answer["interface"]["name"] for name, answer in ready.items()},
            interface=own["name"],
            address=own["address"],
            mpirun=all(answer["mpirun"] for answer in ready.values()),
            more=request.more,
            gpus={name: [gpu["name"] for gpu in answer["gpus"]] for name, answer in ready.items()},
            cpus={name: answer["cpu"] for name, answer in ready.items()},
        ),
    )


def _judge(
    host: Host,
    answer: dict[str, Any] | UserError,
    here: dict[str, Any],
    request: Request,
    device: DeviceName,
    appeared: bool,
    silent: set[str],
    first_names: Mapping[str, str],
) -> Iterator[Finding]:
    """The findings about one host, up to the first that makes the others meaningless."""
    if isinstance(answer, UserError):
        yield Finding("reached", "wrong", str(answer))
        return
    if (first := first_names.get(answer["identity"], host.name)) != host.name:
        yield Finding(
            "reached", "wrong", f"it is {first} under another name", "name it once, with all its slots"
        )
        return
    yield Finding("reached", "ok", answer["hostname"])
    yield _judge_versions(answer, here)
    yield _judge_processes(host, answer, request, device)
    if answer["nameless"]:
        yield Finding("network", "wrong", answer["nameless"])
    else:
        yield _judge_network(answer["interface"], silent)
    if request.data and answer["data"]:
        yield Finding("data", "ok", f"{request.data}")
    elif request.data:
        yield Finding(
            "data", "wrong", f"no readable data folder {request.data} there", "mount it, at the same path"
        )
    problem = answer["output"].get("problem")
    if problem is None and not appeared:
        problem = f"what it writes to {request.output} does not appear here"
    fix = "--output has to be in a folder that all hosts share and may write"
    yield (
        Finding("output", "wrong", problem, fix) if problem else Finding("output", "ok", "shared, writable")
    )


def _judge_network(network: dict[str, Any], silent: set[str]) -> Finding:
    """`silent` hosts did not answer at all: no other is to blame for not reaching them."""
    if "problem" in network:
        return Finding("network", "wrong", network["problem"], "name the right one with --network-interface")
    if unreached := [why for peer, why in network["unreached"].items() if peer not in silent]:
        return Finding("network", "wrong", ", ".join(unreached))
    return Finding("network", "ok", f"{network['name']} {network['address']}")


def _judge_versions(answer: dict[str, Any], here: dict[str, Any]) -> Finding:
    """All that computes has to be the same; of Python the minor version."""
    different = [
        f"{name} {there}, here {own}"
        for name, own in here["versions"].items()
        if _counts(name, there := answer["versions"].get(name, "none")) != _counts(name, own)
    ]
    if not different and answer["horovod"] != here["horovod"]:
        different = [f"Horovod built as {_build(answer['horovod'])}, here {_build(here['horovod'])}"]
    if different:
        return Finding(
            "versions", "wrong", ", ".join(different), "install the same on all hosts, or use --image"
        )
    return Finding(
        "versions", "ok", f"hvd-lb {answer['versions']['hvd-lb']}, torch {answer['versions']['torch']}"
    )


def _counts(name: str, version: str) -> str:
    return version.rpartition(".")[0] if name == "python" else version


def _build(record: dict[str, Any]) -> str:
    if not record:
        return "unknown"
    operations = "+".join(name for name in ("nccl", "gloo", "mpi") if record.get(name))
    return f"{operations} for torch {record['torch']}"


def _judge_processes(host: Host, answer: dict[str, Any], request: Request, device: DeviceName) -> Finding:
    gpus = answer["gpus"]
    if device == "cpu":
        if gpus and request.device == "auto":
            return Finding(
                "GPUs",
                "wrong",
                f"{len(gpus)} GPUs, but other hosts have none",
                "leave out those, or --device cpu",
            )
        slots = _with_slots(host, answer, device).slots
        return Finding("processes", "ok", f"{slots} on {answer['cores']} cores")
    if len(gpus) < (host.slots or 1):
        fewer = "lower its slots in --hosts" if request.more == NAME_MORE else request.more
        fix = f"{fewer}, or see `hvd-lb doctor` there"
        return Finding("GPUs", "wrong", f"{host.slots or 1} GPUs are asked for and it has {len(gpus)}", fix)
    wanted = gpus[: host.slots] if host.slots else gpus
    for index, gpu in [*enumerate(wanted)][request.running.get(host.name, 0) :]:
        if gpu["mig"]:
            return Finding(
                "GPUs",
                "wrong",
                f"GPU {index} is divided into MIG instances, which NCCL does not connect",
                "nvidia-smi -mig 0 there, or --launcher local on one instance (CUDA_VISIBLE_DEVICES=MIG-…)",
            )
        if gpu["processes"] or gpu["used"] > _BUSY_BYTES:
            used = f"{gpu['used'] / _GIB:.1f} of {gpu['total'] / _GIB:.0f} GiB used"
            return Finding("GPUs", "wrong", f"GPU {index} is in use ({used})", "see nvidia-smi there")
    return Finding("GPUs", "ok", f"{len(wanted)} × {wanted[0]['name']}, free")


def _with_slots(host: Host, answer: dict[str, Any], device: DeviceName) -> Host:
    found = len(answer["gpus"]) if device == "cuda" else host.cpus or int(answer["cores"])
    return Host(host.name, host.slots or found)


def _device(asked: str, answers: Mapping[str, dict[str, Any] | UserError]) -> DeviceName:
    """cuda where it is asked for, or where every host that answered has GPUs."""
    there = [bool(answer["gpus"]) for answer in answers.values() if isinstance(answer, dict)]
    if asked == "auto":
        return "cuda" if there and all(there) else "cpu"
    return "cuda" if asked == "cuda" else "cpu"


def _parse(said: str | UserError, version: str) -> dict[str, Any] | UserError:
    """The answer, if it is of this version: another one answers other questions."""
    if isinstance(said, UserError):
        return said
    lines = [line for line in said.splitlines() if line.startswith(probe.ANSWER)]
    if not lines:
        return UserError("it gave no answer")
    answer = probe.parse(lines[-1])
    if (there := answer["versions"]["hvd-lb"]) != version:
        return UserError(f"hvd-lb {there}, here {version}: install the same on all hosts, or use --image")
    return answer


@contextmanager
def _marker(output: Path) -> Iterator[Path]:
    """A file in the nearest folder of `output` that exists, by which others tell that they see the same one."""
    folder = next(parent for parent in (output, *output.parents) if parent.is_dir())
    marker = folder / f"{PASSING}preflight-{secrets.token_hex(8)}"
    try:
        marker.touch(exist_ok=False)
    except OSError as error:
        raise UserError(
            f"output folder {folder} cannot be written ({error.strerror}): choose another --output"
        ) from None
    try:
        yield marker
    finally:
        for path in (marker, *folder.glob(f"{marker.name}.*")):
            with suppress(OSError):
                path.unlink()
