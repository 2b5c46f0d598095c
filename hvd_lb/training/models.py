"""Networks by name, with the paper's initialisation (section 5.1).

Any classification model of torchvision, and the small residual networks for images of a few dozen pixels (He et al.
2016, section 4.2; `resnet20` …, here with 1 × 1 convolutions where the shape changes).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from hvd_lb.errors import UserError, nearest
from hvd_lb.recipe import Recipe
from hvd_lb.training.checkpoint import (
    classes_of,
    load_tensors,
    open_tensors,
    weights_file,
    weights_metadata,
)

# Depth of each: 3 stages of (depth − 2) / 6 blocks.
SMALL_RESNETS = {f"resnet{depth}": (depth - 2) // 6 for depth in (8, 14, 20, 32, 44, 56, 110)}

# torchvision models that return more than logits while training, or initialise slowly, unless told otherwise.
_ARGUMENTS: dict[str, dict[str, bool]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


# Of the same, what their files hold besides.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


def model_arguments(name: str) -> dict[str, bool]:
    """What torchvision's builder of this network is told besides the number of classes."""
    return dict(_ARGUMENTS.get(name, {}))


def model_names() -> list[str]:
    return sorted([*SMALL_RESNETS, *torchvision.models.list_models(module=torchvision.models)])


def check_model_name(name: str) -> None:
    if name not in model_names():
        raise UserError(
            f"unknown model {name!r}{nearest(name, model_names())} "
            "(torchvision's classification models and resnet8/14/20/32/44/56/110)"
        )


def build_model(
    name: str, num_classes: int, *, seed: int, zero_gamma: bool = True, bn_momentum: float = 0.1
) -> nn.Module:
    """The network in fp32 on the CPU, its weights a function of `seed`; the global generator is left as it was.

    Residual networks get the paper's initialisation; other architectures keep torchvision's own.
    """
    check_model_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in SMALL_RESNETS:
            model: nn.Module = SmallResNet(SMALL_RESNETS[name], num_classes)
        else:
            model = torchvision.models.get_model(
                name, weights=None, num_classes=num_classes, **model_arguments(name)
            )
        if isinstance(model, ResNet | SmallResNet):
            initialise(model, zero_gamma=zero_gamma)
    for module in batch_norms(model):
        module.momentum = bn_momentum
    return model


def parameter_count(name: str, num_classes: int, freeze: str = "none") -> int:
    """Trainable numbers of a network, found without making them; those that learn."""
    model = _without_memory(name, num_classes)
    if freeze == "backbone":
        freeze_backbone(model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@cache
def has_batch_norm(name: str) -> bool:
    """Whether a network keeps running statistics of batch norm."""
    return bool(batch_norms(_without_memory(name, 1)))


def check_input(name: str, num_classes: int, image_size: int, images: int) -> None:
    """UserError when the network cannot train on a microbatch of so many images of this size; computes nothing."""
    if problem := input_problem(name, num_classes, image_size, images):
        raise UserError(
            f"{name} cannot train on images of {image_size}×{image_size} pixels in microbatches of {images} "
            f"({problem}): give another --image-size (224 suits most networks) or a larger --per-gpu-batch"
        )


@cache
def input_problem(name: str, num_classes: int, image_size: int, images: int) -> str:
    """Why the network cannot train on such a microbatch; empty when it can."""
    model = _without_memory(name, num_classes).train()
    try:
        with torch.no_grad():
            model(torch.empty(images, 3, image_size, image_size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        return " ".join(str(error).split())
    return ""


def _without_memory(name: str, num_classes: int) -> nn.Module:
    """A network whose tensors have shapes but no values."""
    try:
        with torch.device("meta"):
            return build_model(name, num_classes, seed=0)
    except NotImplementedError:  # RegNet computes its widths with tensors
        return build_model(name, num_classes, seed=0).to("meta")


def initialise(model: nn.Module, *, zero_gamma: bool) -> None:
    """He's initialisation for convolutions, N(0, 0.01) for the classifier, γ = 1 but 0 at the end of each block."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    if zero_gamma:
        for module in model.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)


def last_layer(model: nn.Module) -> str:
    """The name of the layer that gives the logits: the last one with weights that is no batch norm."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return layers[-1]


def last_weight(name: str) -> str:
    """Of a network by name, the tensor that has a row for each output."""
    return f"{last_layer(_without_memory(name, 1))}.weight"


def take_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], source: str, *, other_classes: bool = False
) -> list[str]:
    """Gives `model` the tensors of a network of the same kind; those of the last layer keep their values where the
    other network tells `other_classes` apart, or so many. Their names; UserError where it is no such network.
    """
    own = model.state_dict()
    uncounted = {name: own[name] for name in own if name.endswith(".num_batches_tracked")}  # of older files
    tensors = uncounted | without_auxiliary(model, tensors)
    head = f"{last_layer(model)}."
    of_head = [name for name in own if name.startswith(head)]
    other = [name for name in own if name in tensors and tensors[name].shape != own[name].shape]
    wrong = sorted(own.keys() ^ tensors.keys()) + [
        name for name in other if name not in of_head or tensors[name].shape[1:] != own[name].shape[1:]
    ]
    if wrong:
        raise UserError(
            f"--init-from {source}: holds the weights of another network ({wrong[0]} and "
            f"{len(wrong) - 1} more differ): give the --model that they are of"
        )
    new = of_head if other or other_classes else []
    load_weights(model, {name: own[name] if name in new else tensors[name] for name in own})
    return new


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of what `state_dict` gave, without the versions of modules that came with it, or from a file.

    MNASNet refuses that, as its first version had other layers: so the version of the network is told, and no other, as
    batch norm of the first version, which older files are of, does not count its batches.
    """
    state: OrderedDict[str, Any] = OrderedDict(tensors)
    state._metadata = {"": {"version": model._version}}  # type: ignore[attr-defined]
    model.load_state_dict(state)


def without_auxiliary(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a file for `model`: torchvision's have heads that the training of these networks there used."""
    own = model.state_dict()
    return {name: of for name, of in tensors.items() if name in own or not name.startswith(_AUXILIARY)}


def begin_with(model: nn.Module, path: str, classes: Sequence[str]) -> None:
    """`take_weights` of a run, a checkpoint or a file, for a training on these classes."""
    file = weights_file(Path(path))
    take_weights(model, load_tensors(file), path, other_classes=_names_others(file, classes))


def new_head(recipe: Recipe, classes: Sequence[str]) -> list[str]:
    """What `begin_with` would leave as it is of the weights that a recipe begins with; reads shapes only."""
    assert recipe.init_from
    file = weights_file(Path(recipe.init_from))
    other_classes = _names_others(file, classes)
    with open_tensors(file) as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    model = _without_memory(recipe.model, recipe.num_classes or len(classes))
    return take_weights(model, tensors, str(file), other_classes=other_classes)


def _names_others(file: Path, classes: Sequence[str]) -> bool:
    """Whether the outputs of the network in `file` are, by its own word, other classes, or these in another order."""
    try:
        known = classes_of(weights_metadata(file))
    except UserError as error:
        raise UserError(f"--init-from {error}") from None
    return known is not None and known != list(classes)


def freeze_backbone(model: nn.Module) -> None:
    """Nothing but the last layer learns; batch norm elsewhere uses its running statistics, and keeps them."""
    head = last_layer(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(f"{head}."))
    for norm in batch_norms(model):
        norm.eval()
        norm.train = MethodType(lambda self, mode=True: self, norm)  # type: ignore[method-assign]


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norm layers that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]


class SmallResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels, the last two at half the resolution of the one before."""

    def __init__(self, blocks: int, num_classes: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        stages: list[nn.Module] = []
        width_in = 16
        for width, first_stride in ((16, 1), (32, 2), (64, 2)):
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                stages.append(BasicBlock(width_in, width, stride, _shortcut(width_in, width, stride)))
                width_in = width
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(images)).mean(dim=(2, 3)))


def _shortcut(width_in: int, width: int, stride: int) -> nn.Module | None:
    if width_in == width and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))


def sum_loss(
    label_smoothing: float = 0.0, class_weights: Tensor | None = None, reduction: str = "sum"
) -> Callable[[Tensor, Tensor], Tensor]:
    """Softmax cross-entropy summed over a microbatch: the step divides by the global count (paper remark 3).

    With `class_weights` (outputs,) it is torch's weighted one, in their dtype.
    """
    loss = partial(nn.functional.cross_entropy, reduction=reduction, label_smoothing=label_smoothing)
    if class_weights is None:
        return loss
    return lambda logits, labels: loss(logits.to(class_weights.dtype), labels, weight=class_weights)
