"""The exchange between H100 beside MLPerf Training's figures of ResNet-50; the table of docs/forecast.md.

A GPU has 400, 50 and 16 images in these runs, so that most of what a GPU does less is for its smaller microbatch. Two
numbers are fitted to 8 and 64 GPUs, the time of a microbatch a + b n. With the model's exchange added, they foretell
3,584 GPUs.
"""

import pytest
import torch
import torchvision

from hvd_lb.forecast.profile import load_cluster

#: GPUs, images of each in a step, images/s of each. The images are BATCHSIZE of the configurations DGXH100,
#: DGXH100_multi_8x8x50 and DGXH100_multi_448x8x16 of NVIDIA's submission (mlcommons/training_results_v3.1).
MLPERF = ((8, 400, 7172.0), (64, 50, 4908.0), (3584, 16, 2819.0))


def exchange(gpus: int) -> float:
    """Seconds for the gradients in fp16, all at once after backward, as those configurations have it."""
    with torch.device("meta"):
        size = 2 * sum(parameter.numel() for parameter in torchvision.models.resnet50().parameters())
    return load_cluster("dgx-h100").hierarchy().seconds("halving-doubling", gpus, size)


def microbatch(images: int) -> float:
    """Seconds of a + b n, fitted to the two smaller runs."""
    (few, large, fast), (many, small, slow) = MLPERF[:2]
    first, second = large / fast - exchange(few), small / slow - exchange(many)
    slope = (first - second) / (large - small)
    return second + slope * (images - small)


def test_two_numbers_of_8_and_64_gpus_foretell_3584() -> None:
    gpus, images, measured = MLPERF[2]
    step = microbatch(images) + exchange(gpus)
    assert images / step == pytest.approx(measured, rel=0.1)


def test_the_smaller_microbatch_explains_most_and_the_exchange_the_rest() -> None:
    """Of what a GPU does less on 3,584 than on 8."""
    _, images, measured = MLPERF[2]
    of_8 = MLPERF[0][2]
    by_microbatch = of_8 - images / microbatch(images)
    assert 0.8 < by_microbatch / (of_8 - measured) < 1


if __name__ == "__main__":  # the table of docs/forecast.md
    for gpus, images, measured in (*MLPERF, (2528, 16, 2725.0)):  # of that one the images are not published
        step = microbatch(images) + exchange(gpus)
        print(
            f"{gpus}: {1e3 * exchange(gpus):.2f} of {1e3 * step:.2f} ms, {images / step:.0f}, was {measured:.0f}"
        )
