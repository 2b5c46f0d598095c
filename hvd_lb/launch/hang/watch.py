"""A rank that goes on no more says so: what it does and since when, and in its log where its threads are.

That is all it does: whether the job hangs, and because of whom, the launching process sees from all reports
(`reports`). Nothing is written as long as all goes on.
"""

from __future__ import annotations

import faulthandler
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
    over = threading.Event()
    if timeout:
        thread = threading.Thread(
            target=_watch, args=(run, rank, stages, timeout, over), name="hvd-lb hang", daemon=True
        )
        thread.start()
    try:
        yield
    finally:
        over.set()
        faulthandler.cancel_dump_traceback_later()


def _watch(run: RunDirectory, rank: int, stages: Stages, timeout: float, over: threading.Event) -> None:
    reported: float | None = None  # the beginning of the stage
    while not over.wait(min(_LOOK_SECONDS, timeout / 10)):
        # Written by C when this thread cannot run for so long, as a library holds Python's lock.
        faulthandler.dump_traceback_later(timeout)
        stage, since = stages.now
        seconds = time.monotonic() - since
        tell("stage", stage=stage, step=stages.step, seconds=round(seconds, 1))
        if reported == since:
            continue
        with suppress(OSError):
            if seconds >= timeout:
                patience = _PATIENCE_SECONDS if stage in _TAKES_LONG or not stages.taken else 0.0
                faulthandler.dump_traceback()
                report = {"rank": rank, "step": stages.step, "stage": stage, "seconds": seconds}
                write_json(run.hang(rank), {**report, "until": time.time() + max(0.0, patience - seconds)})
                reported = since
            elif reported is not None:
                run.hang(rank).unlink(missing_ok=True)
                reported = None
