"""The folder that `pack` fills: what may be in it, which shards are done, and how it becomes visible.

TARGET/.unfinished/shards.jsonl   what it is made from, then a line for each finished shard
TARGET/.unfinished/….tar          finished shards, moved to TARGET when all are there; manifest.json comes last
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hvd_lb.data.files.journal import sync
from hvd_lb.data.images import same_images
from hvd_lb.data.options import UNFINISHED
from hvd_lb.data.prepare.shard_writer import Shard
from hvd_lb.data.sources.places import MANIFEST
from hvd_lb.errors import UserError

CLASSES = "classes.json"

_JOURNAL = "shards.jsonl"
_LOCK = ".lock"


class PackFolder:
    """`shards` are the finished ones by name. `made_from` fixes their bytes; `source` says where that lies.

    UserError when `target` is no new or empty folder and was not begun by the same command.
    """

    def __init__(self, target: Path, made_from: Mapping[str, Any], source: str) -> None:
        self.target = target
        self.shards: dict[str, Shard] = {}
        self._work = target / UNFINISHED
        self._made_from, self._source = dict(made_from), source
        self._load()

    @property
    def finished(self) -> bool:
        """Whether a run has come to its end here."""
        return (self.target / MANIFEST).exists() and not self._work.exists()

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Hold the folder, creating it, against a second run; UserError when there is one."""
        self._work.mkdir(parents=True, exist_ok=True)
        with (self._work / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.target}: another `hvd-lb data pack` writes into it; wait for it"
                ) from None
            self._load()  # what another run has done in the meantime
            head = {"made_from": self._made_from, "source": self._source}
            lines = [head, *({"name": name, **shard.as_json()} for name, shard in self.shards.items())]
            self._replace(self._work / _JOURNAL, "".join(json.dumps(line) + "\n" for line in lines))
            yield

    def path(self, name: str) -> Path:
        """Where a shard is made."""
        return self._work / f"{name}.writing"

    def kept(self, name: str) -> Shard | None:
        """A shard that is there and whole: its length and checksum are read anew."""
        shard = self.shards.get(name)
        places = (self._work / name, self.target / name)
        return shard if shard is not None and any(shard.matches(place) for place in places) else None

    def enter(self, name: str, shard: Shard) -> None:
        """A finished shard at `path(name)` gets its name."""
        if self.shards.setdefault(name, shard) != shard:
            raise UserError(
                f"{self._source}: no longer gives the {name} that it gave before; were images, or Pillow, changed? "
                f"Delete {self.target} and pack anew"
            )
        os.replace(self.path(name), self._work / name)
        sync(self._work)
        with (self._work / _JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps({"name": name, **shard.as_json()}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def publish(self, classes: list[str]) -> None:
        """Moves everything to its place, the manifest last."""
        for name in self.shards:
            if (self._work / name).exists():
                os.replace(self._work / name, self.target / name)
        self._replace(self.target / CLASSES, json.dumps({"classes": classes}, indent=1) + "\n")
        sync(self.target)
        shards = {name: shard.as_json() for name, shard in sorted(self.shards.items())}
        manifest = {"made_from": self._made_from, "shards": shards}
        self._replace(self.target / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        sync(self.target)
        shutil.rmtree(self._work)

    def _load(self) -> None:
        """Reads what is finished; UserError for a folder that is not ours."""
        if not self.target.exists():
            return
        if not self.target.is_dir():
            raise UserError(f"{self.target}: is a file; expected a new or empty folder")
        lines = self._journal()
        if lines:
            self._same(lines[0]["made_from"], lines[0]["source"])
            entries = {line["name"]: line for line in lines[1:]}
        elif (self.target / MANIFEST).exists():
            manifest = self._manifest()
            self._same(manifest["made_from"], self._source)
            entries = manifest["shards"]
        elif strangers := sorted(set(os.listdir(self.target)) - {UNFINISHED}):
            raise UserError(f"{self.target}: holds {strangers[0]}; give a new or empty folder")
        else:
            return
        self.shards = {
            name: Shard(**{key: value for key, value in entry.items() if key != "name"})
            for name, entry in entries.items()
        }

    def _journal(self) -> list[dict[str, Any]]:
        """Its lines, without one that was being written when a run was killed."""
        lines = []
        try:
            for line in (self._work / _JOURNAL).read_text("utf-8").splitlines():
                lines.append(json.loads(line))
        except (FileNotFoundError, ValueError):
            pass
        return lines

    def _manifest(self) -> dict[str, Any]:
        path = self.target / MANIFEST
        try:
            manifest = json.loads(path.read_text("utf-8"))
            if manifest["made_from"] and manifest["shards"]:
                return dict(manifest)
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{path}: not written by `hvd-lb data pack`; give a new or empty folder")

    def _same(self, made_from: Mapping[str, Any], source: str) -> None:
        given = {**self._made_from, "source": self._source}
        there = {**made_from, "source": source}
        differing = [
            f"{name.replace('_', '-')} {_told(there.get(name))}, not {_told(given.get(name))}"
            for name in sorted({*given, *there})
            if given.get(name) != there.get(name) and not (name == "data" and _same_data(there, given))
        ]
        if differing:
            raise UserError(
                f"{self.target}: was packed from other data or with other options ({'; '.join(differing)}); "
                "give the same again or another folder"
            )

    def _replace(self, path: Path, text: str) -> None:
        """Writes a file, which is there as a whole or not at all."""
        temporary = self._work / f"{path.name}.writing"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _same_data(there: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Also where an older version began."""
    return same_images(str(there.get("data")), str(given.get("data")))


def _told(value: object) -> str:
    return "none" if value is None else str(value)
