"""The command group, and how errors look: one line, exit code 2, no traceback."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
from contextlib import suppress

import rich_click as click
from click.exceptions import NoArgsIsHelpError

from hvd_lb.errors import UserError
from hvd_lb.world.launched import launched
from hvd_lb_cli.lazy import LazyGroup
from hvd_lb_cli.output.terminal import to_nowhere, tolerate_any_letter

# Threads that wait for each other give up their core: on a shared machine, spinning ones made a step five times
# slower. Read when torch is loaded, here and in the ranks.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_RANK_0_SECONDS = 10.0
_LOOP = "{}: a link that leads to itself: remove it, or give another path"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}

_COMMANDS = {
    "train": "hvd_lb_cli.train:train",
    "simulate": "hvd_lb_cli.simulate:simulate",
    "status": "hvd_lb_cli.watch.status:status",
    "logs": "hvd_lb_cli.watch.logs:logs",
    "stop": "hvd_lb_cli.watch.stop:stop",
    "evaluate": "hvd_lb_cli.trained.evaluate:evaluate",
    "predict": "hvd_lb_cli.trained.predict:predict",
    "export": "hvd_lb_cli.trained.export:export",
    "sweep": "hvd_lb_cli.sweep.group:sweep",
    "report": "hvd_lb_cli.trained.report:report",
    "compare": "hvd_lb_cli.compare:compare",
    "replay": "hvd_lb_cli.replay.replay:replay",
    "verify": "hvd_lb_cli.replay.verify:verify",
    "recipes": "hvd_lb_cli.recipes:recipes",
    "data": "hvd_lb_cli.data.group:data",
    "measure": "hvd_lb_cli.doctor.measure:measure",
    "doctor": "hvd_lb_cli.doctor.command:doctor",
}


@click.group(cls=LazyGroup, lazy=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hvd-lb", prog_name="hvd-lb")
def cli() -> None:
    """Train image models with very large minibatches on many GPUs, without losing accuracy.

    The recipe fixes the mathematics, the hardware only fixes the speed.
    """


def run(arguments: list[str]) -> int:
    """Does what the words after `hvd-lb` say; the exit status. KeyboardInterrupt or Abort when interrupted."""
    tolerate_any_letter()
    try:
        _check_start(arguments)
        status = cli.main(arguments, prog_name="hvd-lb", standalone_mode=False)
        print(end="", flush=True)
    except UserError as error:
        return _failed(str(error), 2)
    except NoArgsIsHelpError as error:
        print(error.format_message())
        return _flushed(2)
    except click.ClickException as error:
        return _failed(error.format_message(), 2)
    except BrokenPipeError:  # `hvd-lb data verify | head`: whoever reads has seen enough
        return _flushed(128 + signal.SIGPIPE)
    except OSError as error:  # a full disk, a folder that went away
        if error.errno == errno.ELOOP:
            return _failed(_LOOP.format(error.filename), 2)
        given = error.errno == errno.ENAMETOOLONG  # it is the name itself
        unnamed = "standard output, or a file that was being written" if error.errno in _FULL else ""
        where = error.filename or unnamed  # an error of write(2) does not know what it is about
        return _failed(
            f"{error.strerror or error}" + (f": {where}" if where else ""),
            2 if given else 1,
        )
    except RuntimeError as error:  # two things that pathlib says
        if "Symlink loop" in str(error):
            return _failed(_LOOP.format(error), 2)
        if "home directory" not in str(error):  # of ~ and ~NAME
            raise
        return _failed(
            "a path begins with ~, and there is no such home directory: write it out, or set HOME", 2
        )
    return _flushed(status if isinstance(status, int) else 0)


def _check_start(arguments: list[str]) -> None:
    """UserError for what no command could make sense of."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        if word == "" or re.fullmatch("--[a-z0-9-]+=", word):
            option = word.rstrip("=") or (before if before.startswith("--") else "an argument")
            raise UserError(
                f"{option} is empty: leave it out, or give a value (is a variable of the shell not set?)"
            )
    try:
        os.getcwd()
    except OSError:
        raise UserError("the working directory is gone: change to one that is there") from None


def _failed(message: str, status: int) -> int:
    place = launched(os.environ)
    if status == 2 and place and place.rank:  # rank 0 was given the same, and says so
        time.sleep(_RANK_0_SECONDS)  # launchers end all where one has ended, and it may not have said it yet
        return 2
    with suppress(OSError):
        print(f"hvd-lb: error: {' '.join(message.split())}", file=sys.stderr)
    return _flushed(status)


def _flushed(status: int) -> int:
    """This exit status, also where nobody reads what is left to be written."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            to_nowhere(stream)
    return status
