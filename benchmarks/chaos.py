"""Random faults over one elastic run, and what is left of it: `python benchmarks/chaos.py --faults 100`.

Real processes on this machine are killed (SIGKILL), stopped (SIGSTOP) or asked to leave (SIGTERM), drawn by --seed; one
fault in five hits two at once. Then the run is ended with a checkpoint, and the same steps are taken by one process
that nothing happens to. Told are: did the run survive, how many steps were repeated, how long it took from each signal
to the next finished step, whether the weights are the same, every sample was applied once, and whether processes,
ports, shared memory, descriptors and memory are as they were.

--peers lets faults drawn alike hit other programs that train the same network on as many images a step:
- torchrun: a plain script with checkpoints, under `torchrun --max-restarts` (peers/restarted.py);
- horovod-elastic: Horovod's own example, under `horovodrun --host-discovery-script` (peers/horovod_elastic.py). It is
  told that each process has a host of its own, as Horovod leaves out the whole host of a process that fails;
- horovod-elastic-one-host: the same, and it is told that there is one host.
A peer's run that ends, or takes no step for --patience seconds, is lost: it is killed, and another one begun.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from peers.applied import IMAGES

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
SIGNALS = ("SIGKILL", "SIGKILL", "SIGKILL", "SIGKILL", "SIGSTOP", "SIGTERM")
HANG_SECONDS = 15
PEER_SECONDS = 30  # Horovod's default; processes that start have to meet in this time, too
PEERS = Path(__file__).with_name("peers")
NAMES_OF_THIS_MACHINE = ("localhost", "127.0.0.1", "127.0.1", "127.1")


class Fault(NamedTuple):
    """Signals to some of so many processes. Where no step was taken afterwards there are no seconds."""

    signals: tuple[str, ...]
    processes: int
    seconds: float | None
    repeated: int

    def kind(self) -> str:
        if "SIGKILL" in self.signals and "SIGSTOP" not in self.signals:
            return f"SIGKILL of {len(self.signals)} of {self.processes}"
        return "SIGSTOP" if "SIGSTOP" in self.signals else "SIGTERM"


@dataclass
class Tally:
    """What faults cost; seconds are from a signal to the next finished step, and until all processes are back."""

    most: int  #: faults
    until: float  #: a time after which there are no more
    faults: list[Fault] = field(default_factory=list)
    until_all: list[float] = field(default_factory=list)
    lost: int = 0

    def add(self, fault: Fault, what: str) -> None:
        self.faults.append(fault)
        took = "no step any more" if fault.seconds is None else f"{fault.seconds:.1f} s"
        print(f"  {len(self.faults)}: {what}: {took}, {fault.repeated} steps repeated", flush=True)

    @property
    def enough(self) -> bool:
        return max(len(self.faults), self.lost) >= self.most or time.monotonic() > self.until

    def lose(self, why: str) -> None:
        self.lost += 1
        print(f"  lost: {why}", flush=True)

    def __str__(self) -> str:
        kinds = defaultdict(list)
        for fault in self.faults:
            kinds[fault.kind()].append(fault.seconds)
        repeated = sum(fault.repeated for fault in self.faults)
        end = f"the run was lost {self.lost} times" if self.lost else "the run survived"
        lines = [
            f"{len(self.faults)} faults: {end}; {repeated} steps repeated",
            f"recovery {times([fault.seconds for fault in self.faults])}; all back {times(self.until_all)}",
            *(f"  {len(kinds[kind])} x {kind}: {times(kinds[kind])}" for kind in sorted(kinds)),
        ]
        return "\n".join(lines)


def times(all_seconds: Sequence[float | None]) -> str:
    seconds = [seconds for seconds in all_seconds if seconds is not None]
    if not seconds:
        return "never"
    return f"median {statistics.median(seconds):.1f} s, worst {max(seconds):.1f} s"


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


def waited(condition: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float) -> Any:
    """What the condition gives, once that is something; None where the process has ended, or so long has passed."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    return None


class Log:
    """Lines of a file, as they come."""

    def __init__(self, file: Path):
        self.file, self._offset = file, 0

    def read(self) -> list[bytes]:
        if not self.file.exists():
            return []
        with self.file.open("rb") as file:
            file.seek(self._offset)
            *lines, _ = file.read().split(b"\n")
        self._offset += sum(len(line) + 1 for line in lines)
        return lines


class Ours:
    """An elastic run of hvd-lb."""

    def __init__(self, run: Path, processes: int, engine: str):
        self.run, self._there, self._first = run, processes, processes
        options = ("--processes", processes, "--elastic", "--hang-timeout", HANG_SECONDS, "--log-samples")
        self.process = train(run, *options, "--engine", engine, "--checkpoint-every", "500steps")
        self._log, self._taken = Log(run / "metrics.jsonl"), False
        self._changes, self._known, self._hit = list[dict[str, Any]](), 0, list[str]()

    def _read(self) -> list[dict[str, Any]]:
        new = [json.loads(line) for line in self._log.read()]
        self._taken |= any(record["kind"] == "train" for record in new)
        self._changes += [record for record in new if record["kind"] in ("generation", "recovered")]
        return self._changes

    def all_are_there(self) -> bool:
        """So many as there should be take steps together."""
        if not self._read():
            return self._taken
        size = next(record["processes"] for record in self._changes[::-1] if record["kind"] == "generation")
        return bool(size == self._there and self._changes[-1]["kind"] == "recovered")

    def living(self) -> dict[int, int]:
        """Process IDs by number in the job."""
        found = {}
        for pid, words in processes_with(str(self.run)).items():
            if "hvd_lb.launch.rank.entry" in words:
                try:
                    lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                except OSError:
                    continue
                variables = dict(line.split("=", 1) for line in lines if "=" in line)
                number = variables.get("HVD_LB_MEMBER") or variables.get("HOROVOD_RANK", "-1")
                found[int(number.split()[0])] = pid
        return found

    def leaves(self, progress: float) -> int:
        """How many may be asked to leave. None comes back, so it is one after a third, and one after two thirds."""
        return min(int(3 * progress), self._first - 2) - (self._first - self._there)

    def there(self) -> str:
        return f"{len(self.living())} of {self._there} live, exit code {self.process.poll()}"

    def hit(self, signals: dict[int, str]) -> None:
        self._known, self._hit = len(self._read()), [f"rank {number} on " for number in signals]
        self._there -= sum(name == "SIGTERM" for name in signals.values())

    def overcome(self) -> list[int]:
        """Steps repeated by each change since the hit; none until all who were hit are gone and a step was taken."""
        new = self._read()[self._known :]
        changes = [record for record in new if record["kind"] == "generation"]
        gone = " ".join(name for record in changes for name in (*record["lost"], *record["left"]))
        recovered = bool(new) and new[-1]["kind"] == "recovered"
        done = recovered and all(name in gone for name in self._hit)
        return [record["repeated"] for record in changes] if done else []


class Peer:
    """A run of another program, known by peers/applied.py's log alone."""

    def __init__(self, name: str, folder: Path, processes: int):
        folder.mkdir()
        self._folder, self._processes = folder, processes
        self._log, self._start = Log(folder / "applied.txt"), -1
        self._log.file.touch()
        # Of each step that the weights have seen, and that was not taken back: its epoch, and images by rank.
        self._steps = dict[int, tuple[int, dict[int, list[str]]]]()
        self._pids, self._repeated, self._taken_back = dict[int, int](), list[int](), 0
        with (folder / "said.log").open("wb") as said:
            command = list(map(str, peer_command(name, folder, processes)))
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)

    def _read(self) -> None:
        for line in self._log.read():
            start, step, epoch, rank, pid, images = line.decode().split(" ")
            if int(start) > self._start:  # steps begin anew: what was done from there on is taken back
                again = [known for known in self._steps if known >= int(step)]
                for known in again:
                    del self._steps[known]
                self._start, self._pids = int(start), {}
                self._repeated.append(len(again))
                self._taken_back += len(again)
            if int(start) == self._start:
                self._steps.setdefault(int(step), (int(epoch), {}))[1][int(rank)] = images.split(",")
                self._pids[int(rank)] = int(pid)

    def all_are_there(self) -> bool:
        self._read()
        return len(self._pids) == self._processes

    def living(self) -> dict[int, int]:
        return dict(self._pids)

    def leaves(self, progress: float) -> int:
        return self._processes  # who is asked to leave comes back

    def there(self) -> str:
        return (
            f"{len(self._pids)} of {self._processes} took the last step, "
            f"{time.time() - self._log.file.stat().st_mtime:.0f} s ago, exit code {self.process.poll()}"
        )

    def hit(self, signals: dict[int, str]) -> None:
        self._read()
        self._repeated.clear()

    def overcome(self) -> list[int]:
        self._read()
        return self._repeated

    def samples(self) -> Counter[str]:
        """Whole epochs, images of these that no step in the weights' history has used, or several have; and steps
        that are not in this history, as they were taken back.
        """
        self._read()
        epochs = defaultdict[int, Counter[str]](Counter)
        for epoch, images in self._steps.values():
            for ids in images.values():
                epochs[epoch].update(ids)
        whole = [epochs[epoch] for epoch in sorted(epochs)[:-1]]
        return Counter(
            epochs=len(whole),
            lost=sum(IMAGES - len(used) for used in whole),
            twice=sum(used.total() - len(used) for used in whole),
            repeated=self._taken_back,
        )

    def end(self) -> None:
        """All of it is killed, also what stands still."""
        left = (
            psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        )
        self.process.kill()
        self.process.wait()
        for pid in {*(process.pid for process in left), *processes_with(str(self._folder))}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def peer_command(name: str, folder: Path, processes: int) -> list[object]:
    if name == "torchrun":
        options = ("--standalone", "--max-restarts", 10_000, "--nproc-per-node", processes)
        launcher = [sys.executable, "-m", "torch.distributed.run", *options]
        return [*launcher, PEERS / "restarted.py", folder, PEER_SECONDS]
    hosts, discovery = folder / "hosts", folder / "discover.sh"
    names = NAMES_OF_THIS_MACHINE[:processes]
    one = name == "horovod-elastic-one-host"
    hosts.write_text(f"localhost:{processes}\n" if one else "".join(f"{name}:1\n" for name in names))
    discovery.write_text(f"#!/bin/sh\ncat {hosts}\n")
    discovery.chmod(0o700)
    return [
        *(Path(sys.executable).with_name("horovodrun"), "--gloo", "--network-interface", "lo"),
        *("-np", processes, "--min-np", 1, "--max-np", processes, "--host-discovery-script", discovery),
        *("--blacklist-cooldown-range", 5, 10, "--gloo-timeout-seconds", PEER_SECONDS),
        *(sys.executable, PEERS / "horovod_elastic.py", folder),
    ]


def holders(run: Path) -> dict[str, tuple[int, float]]:
    """Descriptors and MB of the processes that live as long as the job, and of the rank that has most of them."""
    found = dict[str, tuple[int, float]]()
    for pid, words in processes_with(str(run)).items():
        kinds = {"agent.head", "agent.host", "rank.entry"}
        kind = next((kind for kind in kinds if f"hvd_lb.launch.{kind}" in words), None)
        kind = kind or ("launching" if "train" in words and "hvd_lb_cli.main" in words else None)
        if kind:
            status = Path(f"/proc/{pid}/status").read_text()
            mb = int(status.partition("VmRSS:")[2].split()[0]) / 1024
            files, most = found.get(kind, (0, 0.0))
            found[kind] = max(files, len(os.listdir(f"/proc/{pid}/fd"))), max(most, mb)
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


def drawn(
    draw: random.Random, living: Sequence[int], names: Sequence[str], leaves: int
) -> Iterator[tuple[int, str]]:
    """Whom signals hit; so many may still leave."""
    several = 2 if draw.random() < 0.2 and len(living) > 2 else 1
    for victim in draw.sample(sorted(living), several):
        name = draw.choice(names)
        yield victim, (name if name != "SIGTERM" or leaves > 0 else "SIGKILL")
        leaves -= name == "SIGTERM"


def endure(
    job: Ours | Peer, tally: Tally, draw: random.Random, names: Sequence[str], patience: float
) -> None:
    """Faults, each once all processes are back after the one before, until that is enough or the run is lost."""
    began: float | None = None
    while True:
        if not waited(job.all_are_there, job.process, patience):
            return tally.lose(f"not all processes came, or came back; {job.there()}")
        if began is not None:
            tally.until_all.append(time.monotonic() - began)
        if tally.enough:
            return None
        time.sleep(draw.uniform(0, 1))
        living = job.living()
        hit = dict(drawn(draw, list(living), names, job.leaves(len(tally.faults) / tally.most)))
        job.hit(hit)
        began = time.monotonic()
        for number, name in hit.items():
            os.kill(living[number], signal.Signals[name])
        repeated = waited(job.overcome, job.process, patience)
        seconds = time.monotonic() - began if repeated else None
        words = ", ".join(f"{name} to rank {number}" for number, name in hit.items())
        fault = Fault(tuple(hit.values()), len(living), seconds, sum(repeated or ()))
        tally.add(fault, f"{words} of {len(living)}")
        if not repeated:
            return tally.lose(f"no step was taken any more; {job.there()}")


def chaos(run: Path, arguments: argparse.Namespace) -> Tally:
    """An elastic run with faults, ended with a checkpoint."""
    job = Ours(run, arguments.processes, arguments.engine)
    tally = Tally(arguments.faults, time.monotonic() + 60 * arguments.minutes)
    waited(job.all_are_there, job.process, 300)
    before = holders(run)
    endure(job, tally, random.Random(arguments.seed), arguments.signals, 300)
    if not tally.lost:
        after = holders(run)
        for kind, (files, mb) in before.items():
            now_files, now_mb = after[kind]
            print(f"{kind}: {files} descriptors before, {now_files} after; {mb:.0f} MB, {now_mb:.0f} MB")
        job.process.send_signal(signal.SIGINT)
    job.process.wait(120)
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


def peer(name: str, folder: Path, arguments: argparse.Namespace) -> Tally:
    """Faults on another program, begun anew when it is lost."""
    tally = Tally(arguments.peer_faults, time.monotonic() + 60 * arguments.minutes)
    draw, samples, runs = random.Random(arguments.seed), Counter[str](), 0
    while not tally.enough:
        job, runs = Peer(name, folder / f"{name}-{runs}", arguments.processes), runs + 1
        try:
            endure(job, tally, draw, arguments.signals, arguments.patience)
        finally:
            job.end()
        samples += job.samples()
    print(
        f"samples of {samples['epochs']} whole epochs of {IMAGES:,} images in {runs} runs: "
        f"{samples['lost']:,} not applied, {samples['twice']:,} applied once more; "
        f"{samples['repeated']:,} steps taken back in all"
    )
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="faults of each program end after so long"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--engine", choices=("horovod", "torch"), default="horovod")
    parser.add_argument(
        "--signals", nargs="+", choices=sorted(set(SIGNALS)), default=SIGNALS, metavar="SIGNAL"
    )
    names = ("torchrun", "horovod-elastic", "horovod-elastic-one-host")
    parser.add_argument("--peers", nargs="+", choices=names, default=(), help="the same faults there, too")
    parser.add_argument("--peer-faults", type=int, default=20)
    parser.add_argument(
        "--patience", type=float, default=90, help="seconds without a step in which a peer is lost"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder, before = Path(name), machine()
        if arguments.faults:
            run = folder / "run"
            print(f"hvd-lb train --elastic, {arguments.processes} processes, {arguments.engine}:", flush=True)
            tally = chaos(run, arguments)
            print(tally)
            if tally.lost:
                print((folder / "run.log").read_text()[-2000:])
            else:
                judge(run, folder)
            left = processes_with(str(folder))
            after = machine()
            print(
                f"left behind: {len(left)} processes; "
                + ", ".join(f"{kind}: {len(after[kind] - before[kind])}" for kind in before)
            )
        for other in arguments.peers:
            print(f"{other}, {arguments.processes} processes:", flush=True)
            print(peer(other, folder, arguments))


if __name__ == "__main__":
    main()
