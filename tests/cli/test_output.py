"""What is printed: texts as they are, on any terminal, and whether or not anybody reads."""

import ast
import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.spinner import SPINNERS
from rich.table import Table

from hvd_lb_cli.output.progress import long_progress
from hvd_lb_cli.output.show import print_rows
from hvd_lb_cli.output.terminal import outliving_readers, plain_console, tolerate_any_letter

ROOT = Path(__file__).parents[2]
NAMES = ["[bold]x", "[/b]", "[abc]", ":smile:", "[link=x]y[/link]", "a\\[b]"]
COMMANDS = [
    ("--help",),
    ("train", "--help"),
    ("data", "--help"),
    ("recipes",),
    ("recipes", "goyal-resnet50"),
    ("data", "info", "digits"),
    ("train", "--data", "grüne Äpfel × 2"),
]


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """Every call in the source, with its file and the name of what is called."""
    for path in sorted(path for top in ("hvd_lb", "cli") for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                name = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                yield str(path.relative_to(ROOT)), node, name


def test_no_console_knows_markup() -> None:
    """Consoles are made in one place; columns and spinners read markup whatever their console says."""
    found = list(calls())
    consoles = [(file, call) for file, call, name in found if name == "Console"]
    # The second one writes launching.log.
    assert {file for file, _ in consoles} == {"cli/output/terminal.py", "hvd_lb/report/launching.py"}
    for _, call in consoles:
        assert [word.value.value for word in call.keywords if word.arg in ("markup", "emoji")] == [
            False,
            False,
        ]
    assert not [file for file, _, name in found if name in ("from_markup", "render_markup", "rprint")]
    columns = [call for _, call, name in found if name == "TextColumn"]
    assert len(columns) >= 3
    for call in columns:
        assert [word.value.value for word in call.keywords if word.arg == "markup"] == [False]
    spinners = [
        (file, call) for file, call, name in found if name == "status" or name == "update" and call.args
    ]
    spinners = [(file, call) for file, call in spinners if file.startswith("cli/")]
    texts = [(file, call) for file, call in spinners if isinstance(call.args[0], ast.Call)]
    assert len(texts) >= 5
    for file, call in spinners:
        if not isinstance(call.args[0], ast.Subscript | ast.DictComp):  # a bar's task, a dictionary
            assert isinstance(call.args[0], ast.Call), f"{file}:{call.lineno}"
            assert call.args[0].func.id == "Text", f"{file}:{call.lineno}"


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_are(name: str, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    console = plain_console()
    console.file = io.StringIO()
    console._force_terminal = terminal
    console.width = 120
    table = Table("name")
    table.add_row(name)
    console.print(table)
    print_rows(console, [("data", f"{name}: 3 images"), (name, "topic")])
    console.print(f"writing to /runs/{name}", soft_wrap=True)
    with long_progress(console) as on_progress:
        on_progress(f"indexing {name}", 1, 2)
    assert console.file.getvalue().count(name) >= 4


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "32x32 ... 1 -> 2 gr\\xfcn \\u8bad \\udcff"),
        ("latin-1", "32×32 ... 1 -> 2 grün \\u8bad \\udcff"),
        ("utf-8", "32×32 … 1 → 2 grün 训 \\udcff"),
    ],
)
def test_letters_that_a_terminal_lacks(monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    tolerate_any_letter()
    assert "".join(SPINNERS["dots"]["frames"]).encode("ascii", "hvd-lb") == b"*" * 10
    text = "32×32 … 1 → 2 grün 训 \udcff"
    print(text)
    print(text, file=sys.stderr)
    plain_console().print(text)
    for stream, times in ((sys.stdout, 2), (sys.stderr, 1)):
        stream.seek(0)
        assert stream.read() == f"{shown}\n" * times


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["ascii", "latin-1", "C"],
)
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_on_any_terminal(
    words: tuple[str, ...], environment: dict[str, str], tmp_path: Path
) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "hvd_lb_cli.main", *words],
        env={**os.environ, **environment, "HVD_LB_CACHE": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert process.returncode == (2 if "×" in words[-1] else 0)
    assert b"Traceback" not in process.stderr


@pytest.mark.parametrize("words", [("recipes",), ("recipes", "goyal-resnet50"), ("--help",)], ids=" ".join)
def test_a_full_disk_behind_standard_output_is_named(words: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "hvd_lb_cli.main", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (process.returncode, process.stderr) == (
        1, b"hvd-lb: error: No space left on device: standard output, or a file that was being written\n",
    )  # fmt: skip


def test_a_terminal_without_a_width(hvd_lb: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    assert "goyal-resnet50" in hvd_lb("recipes").out


class Broken(io.StringIO):
    """A stream that nobody reads, or whose disk is full."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_work_goes_on_when_nobody_reads(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    broken = Broken(number)
    monkeypatch.setattr(sys, "stdout", broken)
    monkeypatch.setattr(sys, "stderr", None)
    with outliving_readers():
        print("a line")
        plain_console().print("a line")
        print("a line", file=sys.stderr)
    assert sys.stdout is broken
    with pytest.raises(OSError, match=os.strerror(number)):
        print("a line")


READERS = """
import sys
from hvd_lb_cli import commands, main
from hvd_lb_cli.output.terminal import outliving_readers, plain_console

def command(*_, **__):
    print("first", flush=True)
    sys.stdin.readline()
    {body}
    return 3

commands.cli.main = command
main.main()
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("with outliving_readers(): print('x' * 100_000, flush=True)", 3),
        ("print('x', flush=True)", 128 + signal.SIGPIPE),
        ("print('x')", 128 + signal.SIGPIPE),
        ("plain_console().print('x')", 128 + signal.SIGPIPE),
        ("raise commands.UserError('no')", 2),
    ],
)
def test_the_exit_status_when_the_reader_is_gone(body: str, status: int, unbuffered: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", READERS.format(body=body)],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdin
        assert process.stderr
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.write("go on\n")
        process.stdin.close()
        said = process.stderr.read()
        assert process.wait() == status
        assert said == ("hvd-lb: error: no\n" if status == 2 else "")


@pytest.mark.parametrize(
    "words", [("recipes",), ("recipes", "digits"), ("--help",), ("--version",), ("data", "--help")]
)
def test_a_command_whose_reader_is_gone_ends_as_by_sigpipe(words: tuple[str, ...]) -> None:
    """Not by click's own 1, which of `hvd-lb compare A B | head` would be "they differ"."""
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "hvd_lb_cli.main", *words], stdout=write, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")
