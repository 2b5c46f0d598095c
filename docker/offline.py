"""hvd-lb for machines without a network: a folder with all that is needed, in parts of a size that can be carried.

    python3.12 docker/offline.py make FOLDER [--torch 2.14.1 | --torch present] [--part-size 60]
    python3.12 FOLDER/offline.py install FOLDER [--python venv/bin/python] [--without-horovod] [--sources hvd-lb]

Made with the Python, and on the kind of processor, that the other machines have. `--torch present` leaves out torch and
what comes with it, where a site has its own. The folder holds wheels, Horovod's source with what compiles it, these
scripts, and hvd-lb's sources with tests and benchmarks, which `--sources` unpacks. Only the standard library is used.
"""

import argparse
import configparser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import horovod_parts  # noqa: E402

SCRIPTS = ("offline.py", "horovod_parts.py", "horovod.patch", "build-horovod.sh")
# Of these the sources consist, and these packages run the tests that are for GPUs.
SOURCES = (
    "hvd_lb", "cli", "tests", "benchmarks", "examples", "docker", "docs", "pyproject.toml", "setup.cfg", "Makefile",
    "Dockerfile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE",
)  # fmt: skip
TESTERS = ("pytest", "pytest-timeout", "pytest-xdist")
ARCHIVE = "sources.tar.gz"
SUMS = "SHA256SUMS"
PART = ".part-"
_CHUNK = 2**20


class OfflineError(Exception):
    """Says in one line what is wrong and what to do."""


def make(folder: Path, torch: str, cuda: str | None, part_bytes: int) -> None:
    """Fills an empty folder. `cuda` is that of a torch that is `present`; of another one it is found out."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OfflineError(f"{folder} is there and not empty: name a folder to make")
    folder.mkdir(parents=True, exist_ok=True)
    say("hvd-lb and what it needs")
    pip("wheel", "--no-deps", "--wheel-dir", folder, HERE.parent)
    needed = requirements()
    wanted = without(needed, ("torch", "torchvision")) if torch == "present" else [*needed, f"torch=={torch}"]
    # Exactly these, where other requirements were dropped from among them.
    pip(
        "download",
        "--only-binary",
        ":all:",
        "--dest",
        folder,
        *(["--no-deps"] if torch == "present" else []),
        *wanted,
    )
    if torch != "present":
        cuda = cuda_of(folder)
    say(f"Horovod and what compiles it, for {f'CUDA {cuda}' if cuda else 'the CPU'}")
    # torch brings NCCL.
    tools = [
        tool for tool in horovod_parts.requirements({"cuda": cuda}) if not tool.startswith("nvidia-nccl")
    ]
    pip("download", "--only-binary", ":all:", "--dest", folder, *tools)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "requirements.txt"
        source.write_text(f"horovod=={horovod_parts.HOROVOD} --hash=sha256:{horovod_parts.SDIST_SHA256}\n")
        options = ("--no-deps", "--no-binary", "horovod", "--require-hashes")
        pip("download", *options, "--requirement", source, "--dest", folder)
    for name in SCRIPTS:
        shutil.copy(HERE / name, folder)
    pack_sources(folder / ARCHIVE)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    (folder / SUMS).write_text("".join(f"{checksum(path)}  {path.name}\n" for path in files))
    for path in files:
        if path.stat().st_size > part_bytes:
            split(path, part_bytes)
    made = list(folder.iterdir())
    largest = max(path.stat().st_size for path in made)
    total = sum(path.stat().st_size for path in made)
    say(f"{folder}: {len(made)} files, {total / 1e6:,.0f} MB, the largest {largest / 1e6:,.1f} MB")


def requirements() -> list[str]:
    """Those of setup.cfg, and what runs tests."""
    config = configparser.ConfigParser()
    config.read(HERE.parent / "setup.cfg")
    for_developers = config["options.extras_require"]["dev"].splitlines()
    needed = [line for line in config["options"]["install_requires"].splitlines() if line]
    return needed + [line for line in for_developers if canonical(line) in TESTERS]


def pack_sources(archive: Path) -> None:
    def source(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = Path(member.name).name
        if name == "__pycache__" or name.startswith("."):
            return None
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(archive, "w:gz") as tar:
        for name in SOURCES:
            tar.add(HERE.parent / name, name, filter=source)


def without(needed: list[str], present: tuple[str, ...]) -> list[str]:
    """NAME==VERSION of all that `needed` leads to, but not through what is `present`."""
    report = pip(
        "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", *needed, output=True
    )
    packages = {
        canonical(entry["metadata"]["name"]): entry["metadata"] for entry in json.loads(report)["install"]
    }
    reached: dict[str, str] = {}
    names = [canonical(requirement) for requirement in needed]
    while names:
        name = names.pop()
        if name in packages and name not in reached and name not in present:
            reached[name] = packages[name]["version"]
            # Those of extras and of other platforms are not among the packages, unless something else needs them.
            names += [canonical(requirement) for requirement in packages[name].get("requires_dist", ())]
    return [f"{name}=={version}" for name, version in sorted(reached.items())]


def canonical(requirement: str) -> str:
    """The name at the beginning of a requirement, as indexes spell it."""
    name = requirement.replace("(", " ").split(";")[0].split(" ")[0]
    for end in "[<>=!~":
        name = name.split(end)[0]
    return name.strip().lower().replace("_", "-").replace(".", "-")


def cuda_of(folder: Path) -> str | None:
    """CUDA's version in the torch wheel of a folder."""
    (wheel,) = folder.glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as contents:
        found = re.search(r"^cuda\b.*= '([\d.]+)'", contents.read("torch/version.py").decode(), re.MULTILINE)
    return found.group(1) if found else None


def split(path: Path, part_bytes: int) -> None:
    """Into FILE.part-000, …; the file itself goes."""
    with path.open("rb") as whole:
        for number in range(-(-path.stat().st_size // part_bytes)):
            with path.with_name(f"{path.name}{PART}{number:03d}").open("wb") as part:
                left = part_bytes
                while left and (chunk := whole.read(min(left, _CHUNK))):
                    part.write(chunk)
                    left -= len(chunk)
    path.unlink()


def join(folder: Path, target: Path) -> None:
    """All files of a folder, whole and checked, in another one; OfflineError for what is missing or damaged."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except OSError:
        raise OfflineError(f"{folder} has no {SUMS}: name a folder that `offline.py make` has made") from None
    wrong = []
    for line in lines:
        expected, name = line.split("  ", 1)
        # In the order of their numbers, of which those from 1000 on are longer.
        found = sorted(folder.glob(f"{name}{PART}*"), key=lambda part: (len(part.name), part.name))
        parts = found or [folder / name]
        with (target / name).open("wb") as whole:
            for part in filter(Path.exists, parts):
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole, _CHUNK)
        if checksum(target / name) != expected:
            wrong.append(name)
    if wrong:
        raise OfflineError(
            f"missing or damaged in {folder}: {', '.join(wrong)}; copy them again, with all their parts"
        )


def install(folder: Path, python: str, horovod: bool, sources: Path | None = None) -> None:
    if sources and sources.exists() and (not sources.is_dir() or any(sources.iterdir())):
        raise OfflineError(f"--sources {sources} is there and not empty: name a folder to make")
    with tempfile.TemporaryDirectory(prefix="hvd-lb-offline-") as temporary:
        joined = Path(temporary)
        join(folder, joined)
        # pip obeys these wherever it is called, by the build of Horovod too.
        os.environ.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=temporary, PIP_DISABLE_PIP_VERSION_CHECK="1")
        (own,) = joined.glob("hvd_lb-*.whl")
        torch = [f"torch=={wheel.name.split('-')[1]}" for wheel in joined.glob("torch-*.whl")]
        say(f"hvd-lb into {python}")
        pip("install", own, *torch, *(TESTERS if sources else ()), python=python)
        if sources:
            # Without `filter`, which the first releases of Python 3.11 lack, 3.12 and 3.13 warn.
            safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            with tarfile.open(joined / ARCHIVE) as tar:
                tar.extractall(sources, **safely)
            say(f"sources in {sources}, where benchmarks/gpu.py tries and measures a GPU")
        if not horovod:
            return
        script = joined / "build-horovod.sh"
        script.chmod(0o755)
        built = subprocess.run([script, python], stdout=subprocess.PIPE, text=True, check=False)
        if built.returncode:
            raise OfflineError("Horovod was not built, see above; --without-horovod leaves it out")
        wheel = built.stdout.strip()
        pip("install", wheel, python=python)  # and what it needs
        pip(
            "install", "--force-reinstall", "--no-deps", wheel, python=python
        )  # one for another torch is no other version
    say("done: hvd-lb doctor looks at what is there")


def pip(*arguments: str | os.PathLike[str], python: str = sys.executable, output: bool = False) -> str:
    """Runs pip; what it prints, where that is asked for."""
    command = [python, "-m", "pip", "--disable-pip-version-check", arguments[0], "--quiet", *arguments[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE if output else sys.stderr, text=True, check=False)
    if done.returncode:
        raise OfflineError(f"pip {arguments[0]} failed, see above")
    return done.stdout or ""


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(text: str) -> None:
    print(f"offline: {text}", file=sys.stderr, flush=True)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("make", help="download everything into a folder")
    command.add_argument("folder", type=Path)
    command.add_argument(
        "--torch", default="2.14.1", help="its version, or `present`: the machines have their own"
    )
    command.add_argument(
        "--cuda", help="CUDA of a torch that is present, such as 12.8 (default: a torch for the CPU)"
    )
    command.add_argument("--part-size", type=float, default=60, help="MB of the largest file (default: 60)")
    command = commands.add_parser("install", help="install from such a folder")
    command.add_argument("folder", type=Path)
    command.add_argument(
        "--python", default=sys.executable, help="the interpreter to install into (default: this one)"
    )
    command.add_argument(
        "--without-horovod", action="store_true", help="compile none: one process, or --engine torch"
    )
    command.add_argument(
        "--sources", type=Path, help="folder to unpack the sources in; what runs the tests is installed, too"
    )
    given = parser.parse_args(None if arguments is None else list(arguments))
    if given.command == "install":
        install(given.folder, given.python, not given.without_horovod, given.sources)
        return
    if given.cuda and given.torch != "present":
        parser.error("--cuda is for --torch present; of another torch it is known")
    if not 1 <= given.part_size < 1e6:
        parser.error(f"--part-size {given.part_size:g}: expected 1 MB or more, and less than 1e6")
    make(given.folder, given.torch, given.cuda, round(given.part_size * 1e6))


if __name__ == "__main__":
    try:
        main()
    except (OfflineError, horovod_parts.BuildError) as error:
        sys.exit(f"offline: {error}")
