"""What commands print to: texts as they are, whatever letters the terminal has, and whether or not anybody reads."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TextIO, cast

import rich.console

# As on a typewriter, frames of a spinner too; what is not here, as a letter of a path, is shown by its number: \xfc.
_TYPED = dict.fromkeys("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "*") | {
    "×": "x",
    "…": "...",
    "→": "->",
    "λ": "lambda",
    "γ": "gamma",
    "β": "beta",
    "±": "+-",
    "–": "-",
}


class Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """rich would exit with 1, which for some commands is an answer: that runs differ, or an image is broken."""
        raise  # noqa: PLE0704 - rich calls this where it has caught BrokenPipeError


def plain_console(*, stderr: bool = False) -> Console:
    """Prints texts as they are: a path may hold [bold], :smile: or 42."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def tolerate_any_letter() -> None:
    """Standard output and error take all texts from here on, whatever their encoding."""
    codecs.register_error("hvd-lb", _spelled)
    if os.environ.get("COLUMNS") == "0":  # a terminal that does not tell its width: rich would print nothing
        del os.environ["COLUMNS"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="hvd-lb")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_TYPED.get(letter) or ascii(letter)[1:-1] for letter in letters), error.end


@contextmanager
def outliving_readers() -> Iterator[None]:
    """In here nothing that is printed can fail: work goes on when whoever read it is gone, or its disk is full."""
    streams = sys.stdout, sys.stderr
    guarded = [_Unfailing(stream) if stream else None for stream in streams]
    sys.stdout, sys.stderr = cast(list[TextIO], guarded)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in filter(None, guarded):
            stream.flush()
            if stream.failed:
                to_nowhere(stream)


def to_nowhere(stream: Any) -> None:
    """Send what is left of a stream, and what follows, to nowhere."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Unfailing:
    def __init__(self, stream: TextIO):
        self._stream, self.failed = stream, False

    def write(self, text: str) -> int:
        with self._noted():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._noted():
            self._stream.flush()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.failed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
