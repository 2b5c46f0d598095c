"""--audit with --elastic: who computes wrongly is named and taken out, and the run ends with an honest run's bits."""

from __future__ import annotations

import json
import os
import re
import textwrap
from pathlib import Path

import pytest
from elastic_runs import RESCALED, assert_each_once, assert_it_comes_again, events, with_faults
from real_runs import SMALL, Start, finish, processes_of

from hvd_lb.audit.draw import draw

pytestmark = [pytest.mark.long, pytest.mark.slow]

STEPS = 12
RECIPE = (
    *("train", *SMALL, "--gpus", 3, "--per-gpu-batch", 8, "--steps", STEPS, "--reproducible"),
    *("--log-every", 1, "--checkpoint-every", "4steps"),
)
# For every Python that starts; the process LIAR of the job flips one bit of the classifier's gradient in its
# computations from number FROM to UNTIL.
SITE = """
    import os, sys, threading, time

    NUMBER = (os.environ.get("HVD_LB_MEMBER") or os.environ.get("HOROVOD_RANK") or "-1").split()[0]

    def flip_bits():
        while not hasattr(sys.modules.get("hvd_lb.training.trainer"), "Trainer"):
            time.sleep(0.01)
        trainer, torch = sys.modules["hvd_lb.training.trainer"].Trainer, sys.modules["torch"]
        fit, computed = trainer.fit, []

        def flip(gradient):
            computed.append(1)
            bits = gradient.clone().view(torch.int32)
            bits.view(-1)[7] ^= int(os.environ["FROM"]) <= len(computed) < int(os.environ["UNTIL"])
            return bits.view(torch.float32)

        def wrong_fit(self):
            self.model.fc.weight.register_hook(flip)
            return fit(self)

        trainer.fit = wrong_fit

    if NUMBER == os.environ.get("LIAR") and any("rank.entry" in word for word in sys.orig_argv):
        threading.Thread(target=flip_bits, daemon=True).start()
"""


def step_and_computation(liar: int, processes: int) -> tuple[int, int]:
    """The first step but 0 in which a worker of the liar is audited, and how many it has computed by then."""
    drawn = [draw(0, step, 1.0, 24, 3, 1, [0] * processes) for step in range(STEPS)]
    step = next(step for step, of in enumerate(drawn) if step and of and of.owner == liar)
    return step, step + sum(of is not None and of.auditor == liar for of in drawn[:step])


def lying(
    start: Start,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, object],
    *options: object,
) -> tuple[Path, str]:
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(textwrap.dedent(SITE))
    paths = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    run = folder / "run"
    named = [word for name in variables for word in ("--env", name)]
    elastic = ("--audit", 1, "--elastic", "--log-samples")
    out, _ = finish(start(*RECIPE, *elastic, *named, *options, "--output", run))
    assert not processes_of(run)
    return run, out


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("honest") / "run"


def assert_honest(start: Start, honest: Path, run: Path) -> None:
    if not honest.exists():
        finish(start(*RECIPE, "--processes", 1, "--output", honest))
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        one, other = (of / "checkpoints" / "last" / file for of in (honest, run))
        assert one.read_bytes() == other.read_bytes(), file
    assert_each_once(run, STEPS)


@pytest.mark.parametrize(("engine", "liar"), [("torch", 1), ("horovod", 0)])
def test_who_computes_wrongly_is_taken_out(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honest: Path, engine: str, liar: int
) -> None:
    """And nobody takes its place."""
    if engine == "horovod":
        pytest.importorskip("horovod")
    step, before = step_and_computation(liar, 3)
    variables = {"LIAR": liar, "FROM": before + 1, "UNTIL": 10**6}
    run, out = lying(start, tmp_path, monkeypatch, variables, "--processes", 3, "--engine", engine)
    assert_honest(start, honest, run)
    (audit,) = events(run, "audit")
    assert (audit["step"], audit["liars"], audit["hosts"]) == (step, [liar], ["localhost"])
    (change,) = events(run)
    assert (change["processes"], change["lost"], change["joined"]) == (2, [], 0)
    assert change["left"] == [f"rank {liar} on localhost (computed wrongly)"]
    assert change["repeated"]
    who = f"rank {liar} on localhost computed"
    assert f"{who} virtual worker {liar} wrongly (--audit); the step is taken again without it" in out
    assert f"{who} wrongly and is taken out; its place there stays empty in this job" in out
    assert not (run / "logs" / "rank-0003-localhost.log").exists()


def test_a_liar_is_found_where_k_follows_the_processes(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss, with another k and p, by their draw; and without it k is another once more."""
    faults = [
        (2, "step", 2, "SIGKILL"),
        (4, "data", 1, str(tmp_path / "never")),  # its successor
        (1, "step", 4, "lie"),
    ]
    with_faults(tmp_path, monkeypatch, faults)
    run = tmp_path / "run"
    words = ("--processes", 4, "--audit", 1, "--epochs", 1, "--engine", "torch")
    finish(start(*RESCALED, *words, "--output", run))
    assert not processes_of(run)
    assert_it_comes_again(run)
    assert [scale["workers"] for scale in events(run, "rescale")] == [3, 2]
    (audit,) = events(run, "audit")
    assert (audit["liars"], audit["hosts"]) == ([1], ["localhost"])
    said = re.search(
        r"generation 1: \[\('localhost', (\[.*?\])\)\]", (run / "logs" / "launcher.log").read_text()
    )
    assert said
    rank = json.loads(said[1]).index(1)
    drawn = {step: draw(0, step, 1.0, 144, 3, 1, [0] * 3) for step in range(4, STEPS)}
    found = next(step for step, of in drawn.items() if of and rank in (of.owner, of.auditor))
    assert audit["step"] == events(run, "rescale")[1]["step"] == found
    assert [left for change in events(run) for left in change["left"]] == [
        "rank 1 on localhost (computed wrongly)"
    ]


def test_of_two_that_one_leaves_who_changes_its_mind(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honest: Path
) -> None:
    """And with one left nobody audits."""
    _, before = step_and_computation(0, 2)  # it hosts one of three
    variables = {"LIAR": 0, "FROM": before + 1, "UNTIL": before + 2}
    run, out = lying(start, tmp_path, monkeypatch, variables, "--processes", 2, "--engine", "torch")
    assert_honest(start, honest, run)
    assert [audit["liars"] for audit in events(run, "audit")] == [[0]]
    assert [change["processes"] for change in events(run)] == [1]
    assert "one process is left, and nobody to audit it (--audit)" in out
