"""A rank that goes on no more says so: what it does and since when, and in its log where its threads are.

That is all it does: whether the job hangs, and because of whom, the launching process sees from all reports
(`reports`). One that takes long over a step says that it does go on. Else nothing is written.
"""

from __future__ import annotations

import faulthandler
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hvd_lb.launch.agent.channel import tell
from hvd_lb.report.run_directory import RunDirectory, write_json
from hvd_lb.world.stages import Stage, Stages

# Compiling, a cold file system, a checkpoint on a slow disk: as long as Horovod lets ranks wait for each other.
_PATIENCE_SECONDS = 1800.0
_TAKES_LONG = {Stage.STARTING, Stage.CHECKPOINT, Stage.ENDING}
_LOOK_SECONDS = 5.0


@contextmanager
def watched(run: RunDirectory, rank: int, stages: Stages, timeout: float) -> Iterator[None]:
    """Inside, a thread watches `stages`: a stage of `timeout` seconds is reported, until it goes on. 0: none."""
    if not timeout:
        yield
        return
    # Written by C when no thread can run for so long, as a library holds Python's lock; from the first moment on.
    faulthandler.dump_traceback_later(timeout)
    over = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(run, rank, stages, timeout, over), name="hvd-lb hang", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        # It may be about to report or to ask for tracebacks. A disk that hangs does not keep the rank here.
        thread.join(_LOOK_SECONDS)
        faulthandler.cancel_dump_traceback_later()


def _watch(run: RunDirectory, rank: int, stages: Stages, timeout: float, over: threading.Event) -> None:
    # Of the present step; evaluations and the like belong to the one before.
    began, position = time.monotonic(), -1
    # Of an elastic job this process may have been another program, which has left a report.
    reported, renewed, hung = True, -math.inf, None
    every = min(_LOOK_SECONDS, timeout / 10)
    looked, resumed = began, -math.inf
    while not over.wait(every):
        faulthandler.dump_traceback_later(timeout)  # anew: this thread can run
        now, (stage, since) = time.monotonic(), stages.now
        if now - looked > every + timeout / 2:  # this process was stopped, and most likely all others
            resumed = began = now
        looked, since = now, max(since, resumed)
        if stage == Stage.BETWEEN:
            since = began = now
        if position != stages.taken:
            began, position = now, stages.taken
        seconds = now - since
        # A first step may compile. Who waits then waits for one that says so.
        long = stage in _TAKES_LONG or (not stages.taken and stage != Stage.NETWORK)
        left = max(0.0, _PATIENCE_SECONDS - seconds) if long else 0.0
        hangs = seconds >= timeout and not left
        tell("stage", stage=stage, step=stages.step, seconds=round(seconds, 1), hangs=hangs)
        report = {"rank": rank, "step": stages.step, "stage": stage, "seconds": seconds}
        with suppress(OSError):
            if seconds >= timeout:
                if hung != since:
                    write_json(run.hang(rank), {**report, "patience": left})
                    hung, reported = since, True
                    faulthandler.dump_traceback()
            elif now - began >= timeout / 2:  # a slow step, which does go on: those that wait may know
                if now - renewed >= timeout / 2 or hung is not None:
                    write_json(run.hang(rank), {**report, "patience": timeout})
                    renewed, reported, hung = now, True, None
            elif reported:
                run.hang(rank).unlink(missing_ok=True)
                reported, hung = False, None
