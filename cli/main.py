"""`hvd-lb`: what ends it before its time ends it in one line, from the first moment on. The commands: `commands`."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(KeyboardInterrupt):
    """By one of the signals below. A class of its own: Python ends itself by SIGINT once it saw the plain one."""


class _Signals:
    """What would end a command ends it by Interrupted; not what nohup has set to be ignored, or a library handles.

    While modules are loaded they end it at once: what loads them may take any exception for one of its own.
    """

    def __init__(self) -> None:
        self.number, self.loading = 0, True
        for number in _ENDING:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.loading:
            tell_interrupted(number)
            os._exit(128 + number)
        self.number = number
        raise Interrupted


def main() -> None:
    """Entry point of the console script."""
    signals = _Signals()
    from hvd_lb_cli.commands import run

    signals.loading = False
    try:
        status = run(sys.argv[1:])
    except BaseException as error:
        if not signals.number and not isinstance(error, KeyboardInterrupt):
            raise
        _end_by_signals()
        number = signals.number or signal.SIGINT
        tell_interrupted(number)
        status = 128 + number
    _end_by_signals()
    sys.exit(status)


def tell_interrupted(number: int) -> None:
    if (
        number == signal.SIGTERM
        and "TORCHELASTIC_RUN_ID" in os.environ
        and os.environ.get("RANK", "0") != "0"
    ):
        return  # torchrun ends the others so when one has failed, and that one has said why
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    with suppress(OSError):
        os.write(2, f"hvd-lb: error: interrupted{by}\n".encode())


def _end_by_signals() -> None:
    """What is left needs no word: a signal ends it as it would any program."""
    for number in _ENDING:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()
