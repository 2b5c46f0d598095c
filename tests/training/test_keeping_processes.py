"""What tests/training/test_keeping.py shows on one process, on several: all of them decide alike."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from test_trainer import make_trainer, small_recipe

from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("processes", [2, 3])
def test_all_processes_decide_alike(processes: int, horovodrun: Callable, tmp_path: Path) -> None:
    job = horovodrun(Path(__file__).parent / "ranks" / "keeping.py", processes, str(tmp_path))
    assert job.returncode == 0, job.output
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    assert told == [{"stopped": [4, 15, True], "left_out": [5], "steps": 12}] * processes
    assert open_checkpoint(tmp_path / "stopped" / "last").saved.evaluation_due

    recipe = small_recipe(
        precision="fp32", reproducible=True, eval_every="1epoch", checkpoint_every="1epoch", on_nan="rollback"
    )
    alone = make_trainer(recipe, store=CheckpointStore(tmp_path / "alone"))
    alone.state.left_out = {5}
    alone.fit()
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [tmp_path / run / "last" / name for run in ("alone", "spoilt")]
        assert files[0].read_bytes() == files[1].read_bytes()
