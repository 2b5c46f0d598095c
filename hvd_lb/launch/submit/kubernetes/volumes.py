"""Volumes of an MPIJob's pods: how a user writes them, which hold data and output, and Kubernetes' form of them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.command import Submission

#: Kubernetes' rule for the names of most things (DNS-1123 subdomain).
SUBDOMAIN = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
# Where the manifest and the operator mount something of their own.
_TAKEN = ("/dev/shm", "/etc/mpi", "/home/hvd-lb/.ssh", "/root/.ssh")


@dataclass(frozen=True)
class Volume:
    """A folder of every pod. `source` is a claim or an NFS server; `path` the folder there, or on the node."""

    kind: Literal["pvc", "nfs", "host"]
    source: str
    path: str
    mount: str
    read_only: bool = False

    @property
    def origin(self) -> tuple[str, ...]:
        """What makes it a volume of its own: two folders of one claim are two mounts of one volume."""
        return (self.kind, self.source) if self.kind == "pvc" else (self.kind, self.source, self.path)


def parse_volume(text: str) -> Volume:
    """pvc:CLAIM[/FOLDER]:/MOUNT, nfs:SERVER:/EXPORT:/MOUNT or host:/FOLDER:/MOUNT, each with :ro to only read it."""
    read_only = text.endswith(":ro")
    kind, _, places = text.removesuffix(":ro").partition(":")
    origin, _, mount = places.rpartition(":")
    if _is_folder(mount):
        if kind == "pvc":
            claim, slash, folder = origin.partition("/")
            if re.fullmatch(SUBDOMAIN, claim) and (not slash or _is_folder(f"/{folder}")):
                return Volume("pvc", claim, folder, mount, read_only)
        elif kind == "nfs":
            server, _, export = origin.rpartition(":")
            if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.:-]*", server) and (export == "/" or _is_folder(export)):
                return Volume("nfs", server, export, mount, read_only)
        elif kind == "host" and _is_folder(origin):
            return Volume("host", "", origin, mount, read_only)
    raise UserError(
        f"--k8s-volume {text!r} is not a volume: expected pvc:CLAIM[/FOLDER]:/MOUNT, nfs:SERVER:/EXPORT:/MOUNT or "
        "host:/FOLDER:/MOUNT, with :ro at the end to only read it"
    )


def checked_volumes(submission: Submission, volumes: Sequence[Volume]) -> list[Volume]:
    """The volumes, those of the data and not the output read-only; UserError when a path of the run is on none."""
    taken = set(_TAKEN)
    for volume in volumes:
        if volume.mount in taken:
            raise UserError(
                f"--k8s-volume mounts something at {volume.mount}, which is taken: choose another folder"
            )
        taken.add(volume.mount)
    output = _holding(submission.output.as_posix(), volumes)
    if output is None or output.read_only:
        where = "a volume that is read-only" if output else "no volume, and would be lost with the pods"
        raise UserError(
            f"--output {submission.output} is on {where}: name a folder on a volume that can be written to, "
            "such as --k8s-volume pvc:CLAIM:/runs --output /runs/NAME"
        )
    data = _holding(submission.data.as_posix(), volumes) if submission.data else None
    if submission.data and data is None:
        raise UserError(
            f"--data {submission.data} is on no volume of the pods: name one and the data's place in it, such as "
            "--k8s-volume pvc:CLAIM:/data:ro --data /data/imagenet"
        )
    if submission.recipe and _holding(submission.recipe.as_posix(), volumes) is None:
        raise UserError(
            f"--recipe {submission.recipe} is a file on no volume of the pods: put it on one and give its path there, "
            "or a preset's name"
        )
    return [
        replace(volume, read_only=True) if volume is data and volume is not output else volume
        for volume in volumes
    ]


def output_place(submission: Submission, volumes: Iterable[Volume]) -> str:
    """Where a run writes, as a place of the cluster and not of a pod: pvc:CLAIM/FOLDER and so on."""
    output = posixpath.normpath(submission.output.as_posix())
    volume = _holding(output, volumes)
    if volume is None:
        raise ValueError(f"{output} is on no volume")
    inside = posixpath.relpath(output, volume.mount)
    source = f"{volume.source}:" if volume.kind == "nfs" else f"{volume.source}/" if volume.source else ""
    return posixpath.normpath(f"{volume.kind}:{source}{posixpath.join(volume.path, inside)}")


def pod_volumes(volumes: Iterable[Volume]) -> list[dict[str, Any]]:
    """The volumes of a pod: one for each origin, read-only when all its mounts are."""
    origins: dict[tuple[str, ...], list[Volume]] = {}
    for volume in volumes:
        origins.setdefault(volume.origin, []).append(volume)
    return [
        {"name": f"volume-{number}", **_source(same[0], all(volume.read_only for volume in same))}
        for number, same in enumerate(origins.values())
    ]


def volume_mounts(volumes: Iterable[Volume]) -> list[dict[str, Any]]:
    """The mounts of a container, of the volumes of `pod_volumes`."""
    numbers: dict[tuple[str, ...], int] = {}
    return [
        {
            "name": f"volume-{numbers.setdefault(volume.origin, len(numbers))}",
            "mountPath": volume.mount,
            **({"subPath": volume.path} if volume.kind == "pvc" and volume.path else {}),
            **({"readOnly": True} if volume.read_only else {}),
        }
        for volume in volumes
    ]


def _holding(path: str, volumes: Iterable[Volume]) -> Volume | None:
    """The volume that a path is on: the one mounted deepest above it."""
    place = PurePosixPath(posixpath.normpath(path))
    above = [volume for volume in volumes if place.is_relative_to(volume.mount)]
    return max(above, key=lambda volume: len(volume.mount), default=None)


def _source(volume: Volume, read_only: bool) -> dict[str, Any]:
    flag = {"readOnly": True} if read_only else {}
    match volume.kind:
        case "pvc":
            return {"persistentVolumeClaim": {"claimName": volume.source, **flag}}
        case "nfs":
            return {"nfs": {"server": volume.source, "path": volume.path, **flag}}
        case "host":
            return {"hostPath": {"path": volume.path, "type": "Directory"}}


def _is_folder(path: str) -> bool:
    """Absolute, without . and .., not the root, and without what Kubernetes and this notation keep for themselves."""
    return (
        path.startswith("/")
        and path.strip("/") != ""
        and not path.startswith("//")
        and posixpath.normpath(path) == path
        and not re.search(r"[:\x00-\x1f\x7f]", path)
    )
