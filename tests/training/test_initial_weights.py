"""Runs that begin with trained weights, and learn all of them or the last layer alone."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from test_trainer import CPU, largest_difference, make_trainer, run_steps, small_recipe
from torch import nn
from torch.nn import functional as F  # noqa: N812

from hvd_lb.trained.weights import metadata_of, open_trained
from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint
from hvd_lb.training.models import build_model, new_head, take_weights
from hvd_lb.training.trainer import Trainer


def weights(path: Path, classes: int = 5, model: str = "resnet8") -> Path:
    """Of a network that has seen something: every tensor is a function of its name and shape."""
    tensors = {}
    for name, tensor in build_model(model, classes, seed=9).state_dict().items():
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if not tensor.is_floating_point():
            tensors[name] = torch.tensor(7)
        elif tensor.ndim > 1:
            tensors[name] = torch.randn(tensor.shape, generator=random) / tensor[0].numel() ** 0.5
        else:
            tensors[name] = 0.5 + torch.rand(tensor.shape, generator=random)
    save_file(tensors, path)
    return path


def test_all_of_them_or_all_but_a_new_head(tmp_path: Path) -> None:
    fresh = make_trainer(small_recipe()).model.state_dict()
    same = make_trainer(small_recipe(init_from=str(weights(tmp_path / "5.safetensors"))))
    other = make_trainer(small_recipe(init_from=str(weights(tmp_path / "7.safetensors", classes=7))))
    trained = load_file(tmp_path / "7.safetensors")
    for name, tensor in other.model.state_dict().items():
        begun = same.model.state_dict()[name]
        if name.startswith("fc."):
            assert torch.equal(tensor, fresh[name])
            assert not torch.equal(begun, fresh[name])
        else:
            assert torch.equal(tensor, begun)
            assert torch.equal(tensor.to(trained[name].dtype), trained[name])


def test_a_file_of_old_does_not_count_batches(tmp_path: Path) -> None:
    tensors = load_file(weights(tmp_path / "new.safetensors"))
    uncounted = {name: of for name, of in tensors.items() if not name.endswith("num_batches_tracked")}
    save_file(uncounted, tmp_path / "old.safetensors")
    begun = make_trainer(small_recipe(init_from=str(tmp_path / "old.safetensors"))).model.state_dict()
    assert all(torch.equal(begun[name].float(), of) for name, of in uncounted.items())


@pytest.mark.parametrize("named", ["the same", "in another order", "others", "not at all"])
def test_the_head_is_new_where_as_many_classes_are_others(tmp_path: Path, named: str) -> None:
    """By the names that the file has beside its weights, of which the head has as many as the run needs."""
    recipe, file = small_recipe(), weights(tmp_path / "bare.safetensors")
    fresh = make_trainer(recipe)
    own = fresh.dataset.train.classes
    names = {"the same": own, "in another order": own[::-1], "others": list("vwxyz"), "not at all": ()}
    trained = load_file(file)
    save_file(trained, tmp_path / "named.safetensors", metadata_of(recipe, names[named]))
    begun = make_trainer(small_recipe(init_from=str(tmp_path / "named.safetensors"))).model.state_dict()
    kept = named in ("the same", "not at all")
    expected = trained if kept else fresh.model.state_dict()
    assert all(torch.equal(begun[name], expected[name].to(begun[name])) for name in ("fc.weight", "fc.bias"))
    assert torch.equal(begun["stem.0.weight"], trained["stem.0.weight"].to(begun["stem.0.weight"]))
    told = new_head(small_recipe(init_from=str(tmp_path / "named.safetensors")), own)
    assert told == ([] if kept else ["fc.weight", "fc.bias"])


def test_a_checkpoint_comes_first(tmp_path: Path) -> None:
    recipe = small_recipe(init_from=str(weights(tmp_path / "a.safetensors")), steps=1)
    trainer = make_trainer(recipe, store=CheckpointStore(tmp_path / "c"))
    trainer.fit()
    (tmp_path / "a.safetensors").unlink()
    again = make_trainer(recipe, checkpoint=open_checkpoint(tmp_path / "c" / "last"))
    assert largest_difference(again.model, trainer.model) == 0
    begun = make_trainer(small_recipe(init_from=str(tmp_path / "c" / "last")))
    assert largest_difference(begun.model, trainer.model) == 0
    assert begun.step == 0


def test_a_state_that_is_handed_over_needs_the_file_no_more(tmp_path: Path) -> None:
    """As in an elastic run, which makes a trainer after each change of its processes."""
    file = weights(tmp_path / "model.safetensors")
    recipe = small_recipe(init_from=str(file))
    trainer = make_trainer(recipe)
    run_steps(trainer, 2)
    carried = trainer.hand_over()
    file.unlink()
    again = make_trainer(recipe, carried=carried)
    assert again.step == 2
    assert largest_difference(trainer.model, again.model) == 0


def plain_head(trainer: Trainer, steps: int) -> nn.Module:
    """A linear layer on features that never change, by plain PyTorch."""
    recipe, plan = trainer.recipe, trainer.plan
    model = build_model("resnet8", 5, seed=0)
    model.load_state_dict(trainer.model.state_dict())
    model = model.double().eval()
    optimizer = torch.optim.SGD(
        model.fc.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    with trainer.batches() as batches:
        for step in range(steps):
            optimizer.zero_grad()
            for _ in range(recipe.gpus):
                x, y = next(batches)
                loss = F.cross_entropy(model(x.double()), y, reduction="sum")
                (loss / plan.step_images(step % plan.steps_per_epoch)).backward()
            optimizer.param_groups[0]["lr"] = trainer.schedule(step)
            optimizer.step()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("reproducible", [False, True])
def test_a_frozen_backbone_is_a_linear_layer_on_fixed_features(tmp_path: Path, reproducible: bool) -> None:
    recipe = small_recipe(
        init_from=str(weights(tmp_path / "a.safetensors", classes=7)),
        freeze="backbone",
        reproducible=reproducible,
    )
    trainer = make_trainer(recipe)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    plain = plain_head(trainer, 4)
    run_steps(trainer, 4)
    assert largest_difference(trainer.model, plain) < 1e-12
    changed = [
        name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])
    ]
    assert changed == ["fc.weight", "fc.bias"]


WORDS = ("--data", "digits", "--model", "resnet8", "--gpus", 2, "--per-gpu-batch", 16, "--device", "cpu")


def test_what_is_new_is_said_before_the_run(hvd_lb: Callable[..., Any], tmp_path: Path) -> None:
    file = weights(tmp_path / "7.safetensors", classes=7)
    said = hvd_lb("simulate", *WORDS, "--init-from", file, "--freeze", "backbone", "--budget", "1s")
    assert said.status == 0, said.err
    assert f"begins with: the weights of {file}, but for a new last layer (fc.weight, fc.bias)\n" in said.out
    assert "frozen: all but the last layer\n" in said.out
    for name, wrong in (
        ("none", "is not there"),
        (weights(tmp_path / "20.safetensors", model="resnet20"), "holds the weights of another network"),
        (__file__, "is no safetensors file"),
    ):
        refused = hvd_lb("simulate", *WORDS, "--init-from", name, "--budget", "1s")
        assert (refused.status, refused.out) == (2, ""), name
        assert wrong in refused.err
        assert refused.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_files_of_torchvision_with_heads_that_training_there_used(tmp_path: Path, name: str) -> None:
    theirs = torchvision.models.get_model(name, weights=None, init_weights=False, num_classes=7).eval()
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    own = build_model(name, 7, seed=0)
    assert take_weights(own, load_file(tmp_path / "theirs.safetensors"), "theirs") == []
    (tmp_path / "recipe.yaml").write_text(f"model: {name}\nimage_size: 96\n")
    used = open_trained(tmp_path / "theirs.safetensors", str(tmp_path / "recipe.yaml")).network(CPU)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        for network in (own.eval(), used):
            assert torch.equal(network(images), theirs(images))
