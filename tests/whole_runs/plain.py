"""What a run of hvd-lb computes, once more in plain PyTorch: this program shares nothing with hvd-lb but its inputs.

    python plain.py INPUTS.safetensors NUMBERS.json OUTPUTS.safetensors

INPUTS    initial/NAME: weights and running statistics; images, labels: all microbatches, in the order of epoch, step
          and virtual worker
NUMBERS   k, n, N, epochs, steps (of the run that are taken), learning_rate (for 256 images), warmup_epochs, momentum,
          weight_decay, bn_momentum
OUTPUTS   weights/NAME, statistics/NAME, momentum/NAME (form 9); losses and learning_rates, one per step
"""

import json
import math
import sys

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file

inputs = load_file(sys.argv[1])
with open(sys.argv[2]) as file:
    numbers = json.load(file)
k, n, N, epochs = (numbers[name] for name in ("k", "n", "N", "epochs"))
B = k * n
steps_per_epoch = math.ceil(N / B)
stored = {name.removeprefix("initial/"): t for name, t in inputs.items() if name.startswith("initial/")}
running = {name: tensor.double() for name, tensor in stored.items() if ".running_" in name}
weights = {
    name: t.double().requires_grad_() for name, t in stored.items() if name.endswith(("weight", "bias"))
}
normalised = {name.removesuffix(".running_mean") for name in running if name.endswith("mean")}
decayed = [w for name, w in weights.items() if name.rpartition(".")[0] not in normalised]
gammas_and_betas = [w for name, w in weights.items() if name.rpartition(".")[0] in normalised]
batch_statistics = {name: [] for name in running}  # of this step, one for each virtual worker with images


def convolution(x, name, stride=1):
    weight = weights[f"{name}.weight"]
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def batch_norm(x, name):
    channels = x.detach().transpose(0, 1).flatten(1)
    batch_statistics[f"{name}.running_mean"].append(channels.mean(1))
    batch_statistics[f"{name}.running_var"].append(channels.var(1, correction=1))
    scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return F.batch_norm(x, None, None, scale, shift, training=True, eps=1e-5)


def resnet8(x):
    x = F.relu(batch_norm(convolution(x, "stem.0"), "stem.1"))
    for block, stride in (("stages.0", 1), ("stages.1", 2), ("stages.2", 2)):
        y = F.relu(batch_norm(convolution(x, f"{block}.conv1", stride), f"{block}.bn1"))
        y = batch_norm(convolution(y, f"{block}.conv2"), f"{block}.bn2")
        if stride == 2:
            x = batch_norm(convolution(x, f"{block}.downsample.0", stride), f"{block}.downsample.1")
        x = F.relu(x + y)
    return F.linear(x.mean((2, 3)), weights["fc.weight"], weights["fc.bias"])


def learning_rate(step):
    reference, warmup_steps = numbers["learning_rate"], round(numbers["warmup_epochs"] * steps_per_epoch)
    scaled = reference * B / 256
    if B > 256 and step < warmup_steps:
        return reference + step * (scaled - reference) / warmup_steps
    return scaled / 10 ** sum(step * 90 >= drop * epochs * steps_per_epoch for drop in (30, 60, 80))


optimizer = torch.optim.SGD(
    [{"params": decayed, "weight_decay": numbers["weight_decay"]}, {"params": gammas_and_betas}],
    lr=1.0, momentum=numbers["momentum"], nesterov=True,
)  # fmt: skip
losses, learning_rates, begin = [], [], 0
for step in range(numbers["steps"]):
    images_in_step = min(B, N - step % steps_per_epoch * B)
    optimizer.zero_grad()
    losses.append(0.0)
    for worker in range(k):
        end = begin + (worker + 1) * images_in_step // k - worker * images_in_step // k
        if end > begin:
            logits = resnet8(inputs["images"][begin:end].double())
            loss = F.cross_entropy(logits, inputs["labels"][begin:end], reduction="sum") / images_in_step
            loss.backward()
            losses[-1] += loss.item()
        begin = end
    learning_rates.append(learning_rate(step))
    for group in optimizer.param_groups:
        group["lr"] = learning_rates[-1]
    optimizer.step()
    for name, statistics in batch_statistics.items():
        running[name] += numbers["bn_momentum"] * (torch.stack(statistics).mean(0) - running[name])
        statistics.clear()

outputs = {f"weights/{name}": w.detach() for name, w in weights.items()}
outputs |= {f"statistics/{name}": r for name, r in running.items()}
outputs |= {f"momentum/{name}": optimizer.state[w]["momentum_buffer"] for name, w in weights.items()}
outputs["losses"] = torch.tensor(losses, dtype=torch.float64)
outputs["learning_rates"] = torch.tensor(learning_rates, dtype=torch.float64)
save_file(outputs, sys.argv[3])
