"""`hvd-lb train --detach`: all is checked before the terminal, then the run goes on without it."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hvd_lb.launch.agent.process import dies_with_parent, outlives_parent
from hvd_lb.launch.stopping import heeded_signals
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.report.text import printable

Leave = Callable[[Path], None]


def detached(work: Callable[[Leave], int]) -> int:
    """`work` in a process of its own, which leaves the terminal when it calls what it is given with its run directory.

    The exit status: 0 at once when it does, else that of `work`, which until then gets this process's signals and ends
    with it. To be called before there are threads.
    """
    told, tell = os.pipe()
    prepare = dies_with_parent(signal.SIGTERM)
    child = os.fork()
    if not child:
        os.close(told)
        os.setsid()
        prepare()
        return work(lambda run: _leave(run, tell))
    os.close(tell)
    for number in heeded_signals():
        signal.signal(number, lambda number, _: _pass_on(child, number))
    with open(told, "rb") as pipe:
        run = pipe.read()
    if not run:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status if status >= 0 else 128 - status
    name = shlex.quote(os.fsdecode(run))
    for line in (
        f"process {child} goes on with the run in {os.fsdecode(run)}",
        f"see how it is:           hvd-lb status {name}",
        f"read on:                 hvd-lb logs {name} --follow",
        f"end with a checkpoint:   hvd-lb stop {name}",
    ):
        print(printable(line))
    return 0


def _pass_on(child: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(child, number)


def _leave(run: Path, tell: int) -> None:
    """What is printed from here on is in logs/launching.log, and that of errors that nobody expected."""
    outlives_parent()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    nowhere = os.open(os.devnull, os.O_RDWR)
    log = os.open(RunDirectory(run).launching_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor, target in ((0, nowhere), (1, nowhere), (2, log)):
        os.dup2(target, descriptor)
    for descriptor in (nowhere, log):
        os.close(descriptor)
    with suppress(BrokenPipeError):
        os.write(tell, os.fsencode(run))
    os.close(tell)
