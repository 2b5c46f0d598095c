"""Elastic runs in which a rank does something to itself at a moment that is said exactly, and what is the same then."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from real_runs import SMALL, assert_agrees, processes_of, until

from hvd_lb.replay.again import Again
from hvd_lb.replay.recorded import RecordedRun, open_run
from hvd_lb.replay.verify import checkpoint_digests
from hvd_lb.report.metrics import read_metrics
from hvd_lb.report.samples import samples_of
from hvd_lb.training.checkpoint import open_checkpoint

STEPS = 12
RECIPE = (
    *("train", *SMALL, "--reproducible", "--gpus", 4, "--per-gpu-batch", 24, "--steps", STEPS),
    *("--log-every", 1, "--checkpoint-every", "4steps", "--eval-every", "6steps", "--digest-every", "5steps"),
    "--log-samples",
)
# Where k follows the processes, two virtual workers each.
RESCALED = (
    *("train", *SMALL, "--reproducible", "--gpus", 4, "--per-gpu-batch", 48, "--epochs", 2),
    *("--learning-rate", 0.2, "--last-batch", "keep", "--log-every", 2, "--digest-every", "1steps"),
    *("--checkpoint-every", "4steps", "--keep-checkpoints", 99, "--eval-every", "1epochs", "--log-samples"),
    *("--elastic", "--elastic-policy", "rescale"),
)
# For every Python that starts; a rank does to itself what FAULTS says of its number in the job: [number, what it is
# about to do, after how many steps (or how often it has come to that), how]. A path: it makes PATH.there, and waits.
# "lie" in a step: in it and all further ones of its generation in which it is audited, or audits, one bit of the
# classifier's gradient is wrong.
SITE = """
    import importlib.util, json, os, signal, socket, sys, threading, time, types

    NUMBER = int((os.environ.get("HVD_LB_MEMBER") or os.environ.get("HOROVOD_RANK") or "-1").split()[0])
    FAULTS = [fault for fault in json.loads(os.environ.get("FAULTS", "[]")) if fault[0] == NUMBER]
    PLACES = {
        "step": ("training.trainer", "Trainer", "train_step"),
        "sums": ("training.run_state", "RunState", "step_taken"),
        "log": ("training.trainer", "Trainer", "_log"),
        "save": ("training.trainer", "Trainer", "_save"),
        "evaluation": ("training.evaluation", "Evaluator", "__call__"),
        "end": ("launch.rank.elastic", "", "note_stop"),
        "digest": ("report.metrics", "RunObserver", "_write_digests"),
        "join": ("launch.rank.member", "Member", "join"),
        "state": ("launch.rank.member", "Carried", "from_bytes"),
        "data": ("launch.rank.elastic", "", "data_of"),
    }

    def lie(trainer):
        def flip(gradient):
            drawn = trainer.audit.of(trainer.step)
            bits = gradient.clone().view(sys.modules["torch"].int32)
            bits.view(-1)[7] ^= drawn is not None and trainer.world.rank in (drawn.owner, drawn.auditor)
            return bits.view(gradient.dtype)

        trainer.model.fc.weight.register_hook(flip)

    def fail(how, owner):
        if how == "lie":
            return lie(owner)
        if how == "exit":
            os._exit(0)
        if how == "error":
            raise ValueError("a fault of this rank alone")
        if how in ("UserError", "HostError"):
            raise getattr(sys.modules["hvd_lb.errors"], how)("put it right")
        if how.startswith("/"):
            open(how + ".there", "w").close()
            while not os.path.exists(how):
                time.sleep(0.02)
            return
        os.kill(os.getpid(), getattr(signal, how))

    class Finder:
        @classmethod
        def find_spec(cls, name, *_):
            if name == "hvd_lb.launch.rank.train":
                sys.meta_path.remove(cls)
                spec = importlib.util.find_spec(name)
                load = spec.loader.exec_module
                spec.loader.exec_module = lambda module: (load(module), prepare())
                return spec

    def prepare():
        for _, place, when, how in FAULTS:
            module, holder, name = PLACES[place]
            owner = sys.modules["hvd_lb." + module]
            replace(getattr(owner, holder) if holder else owner, name, when, how)
        if "PRETENDED_NCCL" in os.environ:
            pretend_nccl()

    def replace(owner, name, when, how):
        before, calls = getattr(owner, name), []

        def instead(*arguments, **more):
            calls.append(None)
            if getattr(arguments[0], "step", len(calls)) == when:
                fail(how, arguments[0])
            return before(*arguments, **more)

        setattr(owner, name, staticmethod(instead) if name == "from_bytes" else instead)

    # A collective ends with all processes. Without one of them it never does, but by `abort`, and then with anything.
    def pretend_nccl():
        world = importlib.import_module("hvd_lb.world.torch_distributed")
        before = world.TorchWorld._nccl_for

        class Pretended:
            def __init__(self, store, rank, size, device, *, may_be_aborted):
                assert may_be_aborted
                self.aborted, self.lines = threading.Event(), world.Lines()
                with self.lines.while_joining():
                    self.group = world._gloo(store, rank, size, socket.gethostname(), world._CONNECT)

            def starting(self, collective):
                return lambda: collective(self)

            def allreduce(self, tensors, options):
                return Work(self, self.group.allreduce(tensors, options), *tensors)

            def broadcast(self, tensors, options):
                return Work(self, self.group.broadcast(tensors, options), *tensors)

            def abort(self):
                print("the pretended NCCL is aborted", flush=True)
                self.aborted.set()
                self.lines.cut()

        class Work:
            def __init__(self, group, work, tensor):
                self.group, self.work, self.tensor, self.good = group, work, tensor, False

            def is_completed(self):
                if self.work.is_completed() and not self.good:
                    try:
                        self.work.wait()
                        self.good = True
                    except RuntimeError:
                        pass
                return self.good or self.group.aborted.is_set()

            def wait(self):
                while not self.is_completed():
                    time.sleep(0.01)
                if not self.good:
                    self.tensor.fill_(1)

        def instead(self, tensor):
            by_nccl = tensor.numel() > 100 and tensor.element_size() > 1
            return before(self, types.SimpleNamespace(is_cuda=by_nccl, device=tensor.device))

        world.Nccl, world.TorchWorld._nccl_for = Pretended, instead

    if (FAULTS or "PRETENDED_NCCL" in os.environ) and any("rank.entry" in word for word in sys.orig_argv):
        sys.meta_path.insert(0, Finder)
"""
Fault = tuple[int, str, int, str]


def with_faults(folder: Path, monkeypatch: pytest.MonkeyPatch, faults: Sequence[Fault]) -> None:
    """Ranks of runs that this process starts have them, where FAULTS reaches them."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(textwrap.dedent(SITE))
    paths = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("FAULTS", json.dumps(list(faults)))


def script_in(folder: Path, hosts: str) -> tuple[Path, Path]:
    """A program that prints these hosts, and the file that it reads them from."""
    script, names = folder / "script", folder / "names"
    script.write_text(f"#!/bin/sh\nexec cat {names}\n")
    script.chmod(0o755)
    names.write_text(hosts)
    return script, names


def at(
    gate: Path, process: subprocess.Popen[str], run: Path, do: Callable[[], object], said: Sequence[str]
) -> None:
    """When a rank has come to this gate: do that, and open it when the head has said all of these words."""
    log = run / "logs" / "launcher.log"
    until(lambda: Path(f"{gate}.there").exists() or process.poll() is not None)
    do()
    until(lambda: all(words in log.read_text() for words in said) or process.poll() is not None)
    gate.touch()


def ranks_of(run: Path) -> dict[int, int]:
    """Living ranks by their number in the job, with their process IDs."""
    found = {}
    for pid in processes_of(run):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
            environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        except OSError:
            continue
        variables = dict(line.split("=", 1) for line in environment if "=" in line)
        if "rank.entry" in command:
            number = variables.get("HVD_LB_MEMBER") or variables["HOROVOD_RANK"]
            found[int(number.split()[0])] = pid
    return found


def events(run: Path, kind: str = "generation") -> list[dict[str, Any]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]


def assert_the_same(undisturbed: Path, run: Path) -> None:
    """Weights, velocities and all else that is saved, bitwise; records and images of each step and evaluation, once."""
    for name in ("last", "best"):
        one, other = (of / "checkpoints" / name for of in (undisturbed, run))
        assert other.resolve().name == one.resolve().name
        for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
            assert (other / file).read_bytes() == (one / file).read_bytes(), (name, file)
    for kind, names in (
        ("train", ("step", "loss", "lr", "gradient_norm")),
        ("eval", ("step", "top1_error", "loss", "images")),
        ("digest", ("step", "weights", "velocities", "statistics", "chain")),
    ):
        one, other = (
            [[record[name] for name in names] for record in events(of, kind)] for of in (undisturbed, run)
        )
        assert other == one
    assert_agrees(run)
    assert_each_once(run)


def assert_each_once(run: Path, steps: int = STEPS) -> None:
    """Each virtual worker of each step had its images once, by one process, and no other image."""
    recorded = open_run(run)
    recipe = recorded.recipe
    plan = recipe.sample_plan(len(recorded.open_data(None, None).train))
    samples = samples_of(run)
    assert sorted(samples) == list(range(steps))
    for step, given in samples.items():
        of_workers = (
            plan.image_ids(*divmod(step, plan.steps_per_epoch), worker) for worker in range(recipe.gpus)
        )
        assert given == {worker: [ids.tolist()] for worker, ids in enumerate(of_workers) if len(ids)}


def taken_again(run: RecordedRun) -> Again:
    """All steps of a run, from its seed on one process."""
    again = Again(run, run.open_data(None, None), torch.device("cpu"), None, evaluations=True)
    again.take(run.steps)
    return again


def assert_it_comes_again(path: Path) -> RecordedRun:
    """Records, digests and the last state to the bit, and each image of each epoch once."""
    assert_agrees(path)
    run = open_run(path)
    again = taken_again(run)
    assert again.compared.first is None
    assert again.compared.same_digests == again.compared.digests == run.steps
    assert again.digests() == checkpoint_digests(open_checkpoint(run.checkpoints[run.steps]))
    assert not run.chain.broken
    applied = samples_of(path)
    assert applied.keys() == set(range(run.steps))
    used: dict[int, list[int]] = {}
    for step, by_worker in sorted(applied.items()):
        planned = again.run_plan.at(step)
        ids = {worker: planned.image_ids(worker).tolist() for worker in planned.with_images()}
        assert by_worker == {worker: [of] for worker, of in ids.items()}
        used.setdefault(planned.epoch, []).extend(image for of in ids.values() for image in of)
    images = len(again.dataset.train)
    assert [Counter(of) for of in used.values()] == [Counter(range(images))] * run.recipe.epochs
    return run
