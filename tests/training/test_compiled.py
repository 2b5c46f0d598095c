"""A compiled network's gradients come in parts, so that the exchange goes on beside the rest of backward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from test_trainer import make_trainer, run_steps, small_recipe
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch.aot_autograd import make_boxed_func

from hvd_lb import arithmetic
from hvd_lb.training.models import batch_norms


def watched(events: list[Any]) -> Callable[..., Any]:
    """A compiler that computes graphs as they are; `events` hears when the backward of one ends."""

    def backward(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def compute(*inputs: Any) -> Any:
            outputs = graph.forward(*inputs)
            events.append("end")
            return outputs

        return make_boxed_func(compute)

    return aot_autograd(fw_compiler=boxed_nop, bw_compiler=backward)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16"])
def test_little_is_left_when_the_last_part_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    events: list[Any] = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=watched(events)))
    size = {"image_size": 32} if name == "vit_b_16" else {}
    model = torchvision.models.get_model(name, num_classes=10, **size).train()
    total = sum(parameter.numel() for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda of: events.append(of.numel()))
    arithmetic.compiled(model)(torch.randn(2, 3, 32, 32)).sum().backward()
    last = len(events) - 1 - events[::-1].index("end")
    late = sum(events[last + 1 :])
    assert events.count("end") > 3
    assert sum(size for size in events if size != "end") == total
    assert late < total / 3


@pytest.mark.slow
def test_the_same_steps_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    events: list[Any] = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=watched(events)))
    weights = []
    for compiled in (False, True):
        trainer = make_trainer(small_recipe(precision="fp64", epochs=1, steps=3, compile=compiled))
        trainer.fit()
        weights.append(torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]))
    assert events.count("end") >= 3 * 2
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-9, atol=1e-12)


def test_each_shape_has_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, and whatever came before: one for several would have other bits."""
    torch.compiler.reset()
    compiled_for: list[Any] = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled_for.extend(of.shape[0] for of in inputs if of.shape[1:] == (3, 2, 2))
        return boxed_nop(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=aot_autograd(fw_compiler=note)))
    forward = arithmetic.compiled(torch.nn.Conv2d(3, 4, 1))
    sizes = [8, 5, 8, 4, 3, 7, 5, 9, 10, 11, 12, 13, 2]
    for images in sizes:
        forward(torch.randn(images, 3, 2, 2)).sum().backward()
    assert all(type(size) is int for size in compiled_for)
    assert set(compiled_for) == set(sizes)


def test_batch_norm_of_several_workers_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph it is not there once for each worker, so that as many as one likes can be compiled."""
    for workers in (2, 4):
        operators: list[str] = []

        def note(graph: torch.fx.GraphModule, _: Any, operators: list[str] = operators) -> Callable[..., Any]:
            operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return make_boxed_func(graph.forward)

        torch.compiler.reset()
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=aot_autograd(fw_compiler=note)))
        trainer = make_trainer(small_recipe(gpus=4, together=workers, compile=True))
        monkeypatch.undo()
        run_steps(trainer, 1)
        assert operators.count("aten.var_mean.correction") == len(batch_norms(trainer.model))
        assert not [name for name in operators if "batch_norm" in name]
