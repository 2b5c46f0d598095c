"""In which arithmetic a recipe has a network computed, by training and by what comes after it alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd

from hvd_lb.exact.reproducible import deterministic_kernels, fast_kernels
from hvd_lb.recipe import Recipe

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Of the gradients, at most so much more than this share comes out of one compiled graph; buckets hold as much.
_PARTS = 6
# Of batches in a run: whole and short ones, of each size of images, in training and evaluation.
_SHAPES = 256


def dtype(recipe: Recipe) -> torch.dtype:
    """Of weights and images."""
    return torch.float64 if recipe.precision == "fp64" else torch.float32


def activations(recipe: Recipe) -> torch.dtype:
    """What convolutions make, and batch norm of it."""
    return _AUTOCAST.get(recipe.precision, dtype(recipe))


def memory_format(recipe: Recipe) -> torch.memory_format:
    """Of weights and images."""
    return torch.channels_last if recipe.channels_last else torch.contiguous_format


def kernels(recipe: Recipe) -> AbstractContextManager[None]:
    """What steps run in: only deterministic kernels in the reproducible mode, else the fastest."""
    tf32 = recipe.precision == "tf32"
    return deterministic_kernels(recipe.model, tf32=tf32) if recipe.reproducible else fast_kernels(tf32=tf32)


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[None]:
    """What forward passes run in."""
    if recipe.precision not in _AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[recipe.precision])


def compiled(model: nn.Module) -> Callable[..., Any]:
    """The model's forward by torch.compile, in parts of about a sixth of the parameters, each with its own backward.

    Gradients come out of a compiled graph when its whole backward has ended. Of a single graph all would come at the
    end, and their exchange after it; so the graph is parted, by what torch parts those of DDP with.

    Each shape of a batch has its own graphs. By itself torch takes, once it has met a second size, one graph for all of
    them, which rounds otherwise: bits would depend on what this process has computed before.
    """
    from torch._dynamo import config, lookup_backend  # here: takes a second
    from torch._dynamo.backends.distributed import DDPOptimizer

    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    most = sum(parameter.nbytes for parameter in learning) // _PARTS
    by_default = inspect.signature(torch.compile).parameters["backend"].default or "inductor"
    parts = DDPOptimizer(most, lookup_backend(by_default), first_bucket_cap=most)
    config.recompile_limit = max(config.recompile_limit, _SHAPES)  # what comes after these is not compiled
    return torch.compile(model, backend=parts.compile_fn, dynamic=False)


def widen_depthwise(model: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """With bf16 on CPUs, lets depthwise convolutions have their backward in fp32; forward stays as it is.

    oneDNN computes it in bf16 for strides and for windows larger than 3 × 3 by kernels that are 4 to 140 times slower
    (docs/performance.md). The operands are the same numbers, and the gradients are rounded to bf16 at the end as there.
    """
    if recipe.precision != "bf16" or device.type != "cpu":
        return
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_slow(module):
            module.__class__ = _Depthwise


def _is_slow(layer: nn.Conv2d) -> bool:
    depthwise = layer.groups == layer.in_channels == layer.out_channels > 1
    plain = layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    return (
        depthwise
        and plain
        and (max(layer.stride) > 1 or max(layer.kernel_size) > 3 or max(layer.dilation) > 1)
    )


class _Depthwise(nn.Conv2d):
    """A depthwise convolution whose backward is computed in fp32."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return _WideBackward.apply(input, weight, bias, geometry)


class _WideBackward(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        y = nn.functional.conv2d(x, weight, bias, *geometry)
        # As autocast has them.
        ctx.save_for_backward(x.to(y.dtype), weight.to(y.dtype))
        ctx.geometry, ctx.bias = geometry, bias is not None
        return y

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        gradients = torch.ops.aten.convolution_backward(
            grad.float(), x.float(), weight.float(), [groups], stride, padding, dilation, False, [0, 0], groups,
            ctx.needs_input_grad[:3],
        )  # fmt: skip
        return *(g if g is None else g.to(grad.dtype) for g in gradients), None
