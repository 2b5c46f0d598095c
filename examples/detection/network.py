"""Mask R-CNN of a small residual network that hvd-lb has trained, with a feature pyramid."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from hvd_lb.trained.weights import open_trained

_CHANNELS = 32


def mask_rcnn(weights: Path, classes: int, side: int) -> MaskRCNN:
    """A detector of `classes`, the background not among them, for pictures of `side` pixels; its heads are new.

    `weights` are those of a resnet8 … resnet110 of hvd-lb: a run, a checkpoint or a model.safetensors. Batch norm keeps
    its statistics, γ and β, as there are two pictures in a microbatch only; stem and first stage learn no more. The
    pyramid's new layers have group norm.
    """
    trained = open_trained(weights)
    network = trained.network(torch.device("cpu"))
    blocks = network.stages
    third = len(blocks) // 3
    stages = [blocks[third * stage : third * (stage + 1)] for stage in range(3)]
    body = with_frozen_batch_norm(
        nn.Sequential(
            OrderedDict(stem=network.stem, stage1=stages[0], stage2=stages[1], stage3=stages[2])  # type: ignore[call-overload]
        )
    )
    for part in (body.stem, body.stage1):
        part.requires_grad_(False)
    levels = ["0", "1"]  # strides of 2 and 4; the pyramid adds one of 8, "pool"
    backbone = BackboneWithFPN(body, {"stage2": "0", "stage3": "1"}, [32, 64], _CHANNELS, norm_layer=_norm)
    # A garment of 32 pixels or more is looked at in stride 4.
    scale = {"canonical_scale": 32, "canonical_level": 2}
    model = MaskRCNN(
        backbone,
        min_size=side,
        max_size=side,
        image_mean=list(trained.recipe.mean),
        image_std=list(trained.recipe.std),
        rpn_anchor_generator=AnchorGenerator(((12,), (20,), (34,)), ((0.5, 1.0, 2.0),) * 3),
        rpn_pre_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=60,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 2, **scale),
        box_head=TwoMLPHead(_CHANNELS * 7**2, 128),
        box_predictor=FastRCNNPredictor(128, classes + 1),
        box_batch_size_per_image=24,
        box_detections_per_img=30,
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2, **scale),
        mask_head=MaskRCNNHeads(_CHANNELS, (_CHANNELS, _CHANNELS), 1),
        mask_predictor=MaskRCNNPredictor(_CHANNELS, _CHANNELS, classes + 1),
    )
    # torchvision's initialisation is for runs of 90,000 steps; with He's these layers learn within hundreds.
    for part in (*model.rpn.head.conv.modules(), *model.roi_heads.box_head.modules()):
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    return model


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)


def with_frozen_batch_norm(module: nn.Module) -> nn.Module:
    """The module, its batch norm layers replaced by their affine maps."""
    if isinstance(module, nn.BatchNorm2d):
        frozen = FrozenBatchNorm2d(module.num_features, module.eps)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in module.named_children():
        setattr(module, name, with_frozen_batch_norm(child))
    return module
