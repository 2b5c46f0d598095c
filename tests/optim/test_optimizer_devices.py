"""DistributedOptimizer by itself on each device, against torch.optim.SGD; the host does not wait for a step."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICES, without_waiting
from test_distributed import batches, convnet, difference, loss_sum, wrap

from hvd_lb import parameter_groups

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_microbatches_on_a_device(
    device: torch.device, memory_format: torch.memory_format, set_to_none: bool
) -> None:
    model, plain = (convnet().to(device).to(memory_format=memory_format) for _ in range(2))
    data = [(x.to(device), y.to(device)) for x, y in batches(6)]
    optimizer = wrap(model, bucket_bytes=1000)
    reference = torch.optim.SGD(parameter_groups(plain), 0.1, 0.9, nesterov=True)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=set_to_none)
        for place, batch in enumerate(data[2 * number : 2 * number + 2]):
            optimizer.backward(loss_sum(model, batch), last=place == 1)
        optimizer.step(images=sum(len(y) for _, y in data[2 * number : 2 * number + 2]))

    step(0)
    with without_waiting(device):
        step(1)
        step(2)
    for number in range(3):
        reference.zero_grad()
        chosen = data[2 * number : 2 * number + 2]
        (sum(loss_sum(plain, batch) for batch in chosen) / sum(len(y) for _, y in chosen)).backward()  # type: ignore[union-attr]
        reference.step()
    assert difference(model, plain) < 1e-12


def test_gradients_may_be_clipped_between_backward_and_step(device: torch.device) -> None:
    model, plain = convnet().to(device), convnet().to(device)
    optimizer, reference = wrap(model), torch.optim.SGD(parameter_groups(plain), 0.1, 0.9, nesterov=True)
    for batch in batches(2):
        x, y = (of.to(device) for of in batch)
        optimizer.zero_grad()
        optimizer.backward(loss_sum(model, (x, y)))
        optimizer.synchronize(images=len(y))
        found = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        reference.zero_grad()
        (loss_sum(plain, (x, y)) / len(y)).backward()
        torch.testing.assert_close(found, torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1))
        reference.step()
    assert difference(model, plain) < 1e-12
