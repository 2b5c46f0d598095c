"""Real processes, one of which flips bits: named on the terminal and in metrics.jsonl, in the step it is audited."""

import json
import os
import textwrap
from pathlib import Path

import pytest
from real_runs import SMALL, Start, finish

pytestmark = [pytest.mark.long, pytest.mark.slow]

# For every Python that starts; in rank 1, from its 13th microbatch on, one bit of the classifier's gradient is flipped.
SITE = """
    import sys, threading, time

    def flip_bits():
        while not hasattr(sys.modules.get("hvd_lb.training.trainer"), "Trainer"):
            time.sleep(0.01)
        trainer, torch = sys.modules["hvd_lb.training.trainer"].Trainer, sys.modules["torch"]
        fit, computed = trainer.fit, []

        def flip(gradient):
            computed.append(1)
            bits = gradient.clone().view(torch.int32)
            bits.view(-1)[7] ^= len(computed) > 12
            return bits.view(torch.float32)

        def wrong_fit(self):
            if self.world.rank == 1:
                self.model.fc.weight.register_hook(flip)
            return fit(self)

        trainer.fit = wrong_fit

    if any("rank.entry" in word for word in sys.orig_argv):
        threading.Thread(target=flip_bits, daemon=True).start()
"""


@pytest.mark.parametrize("engine", ["torch", "horovod"])
def test_the_one_that_is_wrong_is_named(
    engine: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "horovod":
        pytest.importorskip("horovod")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(textwrap.dedent(SITE))
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    run = tmp_path / "run"
    words = ("--gpus", 6, "--per-gpu-batch", 8, "--processes", 3, "--steps", 16, "--engine", engine)
    process = start("train", *SMALL, *words, "--reproducible", "--audit", 1, "--output", run)
    out, _ = finish(process)
    audits = [
        record
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "audit"
    ]
    assert audits
    for record in audits:
        assert record["step"] >= 4  # of two microbatches each, and one that it audits now and then
        assert (record["liars"], record["hosts"]) == ([1], ["localhost"])
        assert record["moved_to"] in (0, 2)
        worker = record["workers"][0]
        assert (
            f"warning: epoch 0 step {record['step']}: rank 1 on localhost computed virtual worker {worker} wrongly "
            f"(--audit); the step is taken again, with rank {record['moved_to']} computing that"
        ) in out


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_one_process_audits_nobody(start: Start, tmp_path: Path, dry: tuple[str, ...]) -> None:
    words = ("--gpus", 2, "--processes", 1, "--steps", 2, "--reproducible", "--audit", 0.5, *dry)
    _, err = finish(start("train", *SMALL, *words, "--output", tmp_path / "run"), status=2)
    assert err.startswith(
        "hvd-lb: error: --audit 0.5: one process has nobody to compare with: give --processes 2"
    )
    assert not (tmp_path / "run").exists()
