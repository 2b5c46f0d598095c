"""Nothing of the run state is missing in a checkpoint, and nothing in it is overlooked by whoever goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_trainer import make_trainer, small_recipe

from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reproducible": True, "precision": "fp32"},
        {"momentum_form": 9},
        pytest.param({"precision": "fp16"}, marks=pytest.mark.slow),
    ],
)
def test_what_was_loaded_and_is_saved_again_has_the_same_bytes(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """Also in mid-epoch, with losses that have not been told, and after an evaluation."""
    recipe = small_recipe(
        epochs=2,
        steps=6,
        eval_every="1epoch",
        checkpoint_every="3steps",
        log_every=4,
        last_batch="keep",
        **changes,
    )
    store = CheckpointStore(tmp_path / "run", keep=9)
    make_trainer(recipe, store=store).fit()
    again = CheckpointStore(tmp_path / "again", keep=9)
    found = store.newest_first()
    assert {"step-00000006", "step-00000003"} <= {path.name for path in found}
    for path in found:
        resumed = make_trainer(recipe, checkpoint=open_checkpoint(path))
        model, optimizer, state = resumed.state.saved(
            resumed.state.gather(), resumed.place, recipe.mathematics(), **resumed._provenance
        )
        copied = again.save(resumed.step, model, optimizer, state.to_json())
        for file in path.iterdir():
            assert (copied / file.name).read_bytes() == file.read_bytes(), file.name
