"""Who may write into a run directory: one launching process, by the best lock that the file system has.

- flock(2): the launcher of the ranks inherits it, so it lasts as long as anybody writes.
- fcntl(2), where flock is not there (Lustre without it, some FUSE): it ends with the launching process, which takes its
  ranks along, a few seconds later where they are on other hosts.
- A file that names its maker, where neither is there (NFS without lockd): it stays after a crash. One of a dead
  process of this machine is taken over; whether another machine's is still there only a person can know.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hvd_lb.errors import UserError
from hvd_lb.machine.process import is_running, this_process

# What a file system answers that has no such lock; all else is about this one file.
_NOT_THERE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}


class DirectoryLock:
    """Holds `folder` from the start until `close`, or the end of this process; UserError when another run does.

    `descriptor` is to be inherited by whoever writes there, too; `warning` is empty where it is a flock. `maker` is the
    file that stands for a lock where there is none.
    """

    def __init__(self, folder: Path, maker: Path):
        self._of = folder, maker
        self._take()

    def _take(self) -> None:
        folder, maker = self._of
        self.warning = ""
        self._maker: Path | None = None
        self.descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if _locked(fcntl.flock, self.descriptor, folder):
                return
            if _locked(fcntl.lockf, self.descriptor, folder):
                self.warning = f"{folder} is locked by fcntl, as its file system has no flock"
                return
            _make(maker, folder)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._maker = maker
        self.warning = (
            f"the file system of {folder} has no locks; {maker} stands for one, and stays if this process is killed: "
            "start no second run there from another machine"
        )

    def is_held(self) -> bool:
        """Whether what is there by the folder's name is still what was locked. OSError where that cannot be seen."""
        try:
            return os.path.samestat(os.stat(self._of[0] / ".lock"), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False

    def take_again(self) -> None:
        """Hold what is there by that name now. OSError; UserError when another run holds it."""
        before = self.descriptor
        try:
            self._take()
        except BaseException:
            self.descriptor = before
            raise
        os.close(before)

    def close(self) -> None:
        with suppress(OSError):
            if self._maker:
                self._maker.unlink(missing_ok=True)
        with suppress(OSError):
            os.close(self.descriptor)


def _locked(lock: Callable[[int, int], object], descriptor: int, folder: Path) -> bool:
    """True: it is held now. False: the file system has no locks of this kind."""
    try:
        lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return False
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _in_use(folder, "another run") from None
        raise
    return True


def _in_use(folder: Path, whom: str) -> UserError:
    return UserError(f"output folder {folder} is in use by {whom}: wait for it, or choose another --output")


def _make(maker: Path, folder: Path) -> None:
    """Makes the file that stands for a lock, once a dead process's is out of the way."""
    while True:
        try:
            descriptor = os.open(maker, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            _remove_stale(maker, folder)
        else:
            break
    with open(descriptor, "w", encoding="utf-8") as stream:
        json.dump(this_process(), stream)


def _remove_stale(maker: Path, folder: Path) -> None:
    """UserError where the process that made it may be alive."""
    aside = maker.with_name(f".{maker.name}.{os.getpid()}")
    try:
        content = maker.read_bytes()
        _refuse_living(maker, content, folder)
        os.rename(maker, aside)
        if aside.read_bytes() != content:  # somebody was faster, and this is his
            os.rename(aside, maker)
            raise _in_use(folder, "another run")
        aside.unlink()
    except FileNotFoundError:
        pass


def _refuse_living(maker: Path, content: bytes, folder: Path) -> None:
    try:
        made_by = json.loads(content)
        pid, host, there = int(made_by["pid"]), str(made_by["host"]), is_running(made_by)
    except (ValueError, TypeError, LookupError):
        raise UserError(
            f"{maker} stands for a lock of {folder}, but is damaged: remove it if no run writes there"
        ) from None
    if there is None:
        raise UserError(
            f"output folder {folder} is in use by process {pid} on host {host}, or was when that host went down: "
            f"remove {maker} if that process is no more"
        )
    if there:
        raise _in_use(folder, f"process {pid}")
