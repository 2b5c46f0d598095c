"""Asking a run to end, from any machine that sees its run directory."""

from __future__ import annotations

import signal

from hvd_lb.errors import UserError
from hvd_lb.launch.stopping import AT_ONCE, read_wish
from hvd_lb.report.run_directory import RunDirectory, replace_text
from hvd_lb.report.text import printable


def ask_to_stop(run: RunDirectory, *, at_once: bool) -> None:
    """As Ctrl-C where the run was started: after the present step, with a checkpoint; or as a second one, at once.

    Not as SIGTERM: a job of Slurm that ends by that is put back into the queue. UserError for who may not write there.
    """
    wish = AT_ONCE if at_once else str(int(signal.SIGINT))
    present = read_wish(run.stop)
    if present == AT_ONCE or (present and not at_once):
        return
    try:
        replace_text(run.stop, wish)
    except PermissionError:
        raise UserError(
            f"{printable(str(run.stop))} cannot be written: only who may write into the run directory can stop the run"
        ) from None
