"""Random faults over one elastic run, and what is left of it: `python benchmarks/chaos.py --faults 100`.

Real processes on this machine are killed (SIGKILL), stopped (SIGSTOP) or asked to leave (SIGTERM), drawn by --seed; one
fault in five hits two at once. Then the run is ended with a checkpoint, and the same steps are taken by one process
that nothing happens to. Told are: did the run survive, how many steps were repeated, how long it took from each signal
to the next finished step, whether the weights are the same, every sample was applied once, and whether processes,
ports, shared memory, descriptors and memory are as they were. --torchrun lets the same faults hit a plain script with
checkpoints under `torchrun --max-restarts` (benchmarks/peers/restarted.py).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

RECIPE = (
    *("--data", "digits", "--device", "cpu", "--model", "resnet8", "--threads", "1", "--reproducible"),
    *(
        "--gpus",
        "4",
        "--per-gpu-batch",
        "24",
        "--epochs",
        "100000",
        "--log-every",
        "1",
        "--eval-every",
        "never",
    ),
)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
HANG_SECONDS = 15
PEER = Path(__file__).with_name("peers") / "restarted.py"


@dataclass
class Tally:
    """What faults cost; seconds are from a signal to the next finished step of the run."""

    faults: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    repeated: int = 0
    survived: bool = True

    def add(self, what: str, seconds: float, repeated: int) -> None:
        self.faults.append(what)
        self.seconds.append(seconds)
        self.repeated += repeated
        print(f"  {len(self.faults)}: {what}: {seconds:.1f} s, {repeated} steps repeated", flush=True)

    def __str__(self) -> str:
        if not self.seconds:
            return "no fault was overcome"
        times = f"median {statistics.median(self.seconds):.1f} s, worst {max(self.seconds):.1f} s"
        end = "the run survived" if self.survived else "the run was LOST"
        return f"{len(self.faults)} faults: {end}; {self.repeated} steps repeated; recovery {times}"


def processes_with(text: str) -> dict[int, list[str]]:
    """Living processes with a text on their command line, and their words."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and int(folder.name) != os.getpid() and any(text in word for word in words):
            found[int(folder.name)] = words
    return found


def ranks_of(run: Path) -> dict[int, int]:
    """Process IDs by number in the job."""
    found = {}
    for pid, words in processes_with(str(run)).items():
        if "hvd_lb.launch.rank.entry" in words:
            try:
                lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            variables = dict(line.split("=", 1) for line in lines if "=" in line)
            number = variables.get("HVD_LB_MEMBER") or variables.get("HOROVOD_RANK", "-1")
            found[int(number.split()[0])] = pid
    return found


class Changes:
    """Records of an elastic run about who is there, read as they come."""

    def __init__(self, run: Path):
        self._file, self._offset = run / "metrics.jsonl", 0
        self.steps, self.all = False, list[dict[str, Any]]()

    def read(self) -> list[dict[str, Any]]:
        if self._file.exists():
            with self._file.open("rb") as file:
                file.seek(self._offset)
                *lines, _ = file.read().split(b"\n")
            self._offset += sum(len(line) + 1 for line in lines)
            new = [json.loads(line) for line in lines]
            self.steps |= any(record["kind"] == "train" for record in new)
            self.all += [record for record in new if record["kind"] in ("generation", "recovered")]
        return self.all

    def all_are_there(self, processes: int) -> bool:
        """So many take steps together."""
        if not self.read():
            return self.steps
        size = next(record["processes"] for record in self.all[::-1] if record["kind"] == "generation")
        return bool(size == processes and self.all[-1]["kind"] == "recovered")

    def overcome(self, known: int, names: Sequence[str]) -> list[dict[str, Any]]:
        """Changes after the `known` ones by which all of these were lost or left, once a step was taken after them."""
        new = self.read()[known:]
        changes = [record for record in new if record["kind"] == "generation"]
        gone = " ".join(name for record in changes for name in (*record["lost"], *record["left"]))
        recovered = bool(new) and new[-1]["kind"] == "recovered"
        return changes if recovered and all(name in gone for name in names) else []


def waited(condition: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 300) -> Any:
    """What the condition gives, once that is something; None where the process has ended, or so long has passed."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    return None


def holders(run: Path) -> dict[str, tuple[int, float]]:
    """Descriptors and MB of the processes that live as long as the job."""
    found = {}
    for pid, words in processes_with(str(run)).items():
        kind = next((name for name in ("agent.head", "agent.host") if f"hvd_lb.launch.{name}" in words), None)
        kind = kind or ("launching" if "train" in words and "hvd_lb_cli.main" in words else None)
        if kind:
            status = Path(f"/proc/{pid}/status").read_text()
            mb = int(status.partition("VmRSS:")[2].split()[0]) / 1024
            found[kind] = len(os.listdir(f"/proc/{pid}/fd")), mb
    return found


def machine() -> dict[str, set[str]]:
    """Listening ports and shared memory."""
    ports = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                ports.add(fields[1])
    return {"ports": ports, "/dev/shm": set(os.listdir("/dev/shm"))}


def drawn(draw: random.Random, living: Sequence[int], leaves: int) -> Iterator[tuple[signal.Signals, int]]:
    """Signals and whom they hit; so many may still leave."""
    several = 2 if draw.random() < 0.2 and len(living) > 2 else 1
    for victim in draw.sample(sorted(living), several):
        sign = draw.choice(SIGNALS)
        yield (sign if sign is not signal.SIGTERM or leaves > 0 else signal.SIGKILL), victim
        leaves -= sign is signal.SIGTERM


def chaos(run: Path, faults: int, seed: int, processes: int, engine: str) -> Tally:
    """An elastic run with faults, ended with a checkpoint."""
    draw, tally, changes = random.Random(seed), Tally(), Changes(run)
    options = ("--processes", processes, "--elastic", "--hang-timeout", HANG_SECONDS, "--log-samples")
    process = train(run, *options, "--engine", engine, "--checkpoint-every", "500steps")
    there = processes
    before: dict[str, tuple[int, float]] = {}
    while tally.survived and len(tally.faults) < faults:
        tally.survived = bool(waited(partial(changes.all_are_there, there), process))
        if not tally.survived:
            break
        before = before or holders(run)
        time.sleep(draw.uniform(0, 1))
        pids, known = ranks_of(run), len(changes.read())
        hit = list(drawn(draw, list(pids), min(2, there - 2)))
        began = time.monotonic()
        for sign, victim in hit:
            os.kill(pids[victim], sign)
        there -= sum(sign is signal.SIGTERM for sign, _ in hit)
        names = [f"rank {victim} on " for _, victim in hit]
        found = waited(partial(changes.overcome, known, names), process)
        tally.survived = bool(found)
        if found:
            what = ", ".join(f"{sign.name} to rank {victim}" for sign, victim in hit)
            tally.add(what, time.monotonic() - began, sum(record["repeated"] for record in found))
    if tally.survived:
        waited(partial(changes.all_are_there, there), process)
        after = holders(run)
        for kind, (files, mb) in before.items():
            now_files, now_mb = after[kind]
            print(f"{kind}: {files} descriptors before, {now_files} after; {mb:.0f} MB, {now_mb:.0f} MB")
        process.send_signal(signal.SIGINT)
    process.wait(120)
    return tally


def train(run: Path, *options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hvd_lb_cli.main", "train", *RECIPE, *options, "--output", run]
    with (run.parent / f"{run.name}.log").open("wb") as log:
        return subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def judge(run: Path, folder: Path) -> None:
    """Compare with the same steps of one process that nothing happened to; and look at the samples."""
    steps = json.loads((run / "checkpoints/last/state.json").read_text())["step"]
    undisturbed = folder / "undisturbed"
    process = train(undisturbed, "--processes", 1, "--steps", steps, "--checkpoint-every", "never")
    process.wait()
    weights = "checkpoints/last/model.safetensors"
    alike = (run / weights).read_bytes() == (undisturbed / weights).read_bytes()
    print(f"weights after {steps:,} steps: {'the same bits as undisturbed' if alike else 'DIFFERENT'}")

    from hvd_lb.data.dataset import open_dataset
    from hvd_lb.replay.recorded import open_run
    from hvd_lb.report.samples import samples_of

    recipe, samples = open_run(run).recipe, samples_of(run)
    plan = recipe.sample_plan(len(open_dataset("digits").train))
    wrong = sum(
        samples.get(step, {}).get(worker)
        != [plan.image_ids(*divmod(step, plan.steps_per_epoch), worker).tolist()]
        for step in range(steps)
        for worker in range(recipe.gpus)
    )
    print(f"samples: {wrong} of {steps * recipe.gpus:,} microbatches not applied exactly once")


def under_torchrun(folder: Path, faults: int, seed: int, processes: int) -> Tally:
    """The same faults on a plain script; a step that was done before and is done again is a repeated one."""
    draw, tally = random.Random(seed), Tally()
    log = folder / "steps.txt"
    log.touch()
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--max-restarts",
        str(10 * faults),
    ]
    script = [str(PEER), str(folder), str(HANG_SECONDS)]
    with (folder / "torchrun.log").open("wb") as said:
        process = subprocess.Popen(
            [*launcher, "--nproc-per-node", str(processes), *script], stdout=said, stderr=said
        )

    def done() -> list[int]:
        return [int(line) for line in log.read_text().split("\n")[:-1]]

    while len(tally.faults) < faults:
        known = len(done())
        if not waited(lambda known=known: len(done()) > known + 5, process):  # type: ignore[misc]
            tally.survived = False
            break
        time.sleep(draw.uniform(0, 20))
        living = [
            pid for pid, words in processes_with(str(PEER)).items() if "torch.distributed.run" not in words
        ]
        hit = list(drawn(draw, living, 2))
        known, began = len(done()), time.monotonic()
        for sign, pid in hit:
            os.kill(pid, sign)

        def again(known: int = known) -> tuple[int, int] | None:
            steps = done()
            for before, after in zip(steps[known:], steps[known + 1 :], strict=False):
                if after <= before:  # it went back
                    return before, after
            return None

        turned = waited(again, process)
        if turned is None:
            tally.survived = False
            break
        tally.add(
            ", ".join(sign.name for sign, _ in hit), time.monotonic() - began, turned[0] - turned[1] + 1
        )
    process.terminate()
    process.wait(60)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--engine", choices=("horovod", "torch"), default="horovod")
    parser.add_argument("--torchrun", action="store_true", help="the same faults on a plain script, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder, before = Path(name), machine()
        run = folder / "run"
        print(f"hvd-lb train --elastic, {arguments.processes} processes, {arguments.engine}:", flush=True)
        tally = chaos(run, arguments.faults, arguments.seed, arguments.processes, arguments.engine)
        print(tally)
        if not tally.survived:
            print((folder / "run.log").read_text()[-2000:])
        else:
            judge(run, folder)
        left = processes_with(str(folder))
        after = machine()
        print(
            f"left behind: {len(left)} processes; "
            + ", ".join(f"{kind}: {len(after[kind] - before[kind])}" for kind in before)
        )
        if arguments.torchrun:
            print("torchrun --max-restarts, a plain script with a checkpoint every 50 steps:", flush=True)
            print(under_torchrun(folder, arguments.faults, arguments.seed, arguments.processes))


if __name__ == "__main__":
    main()
