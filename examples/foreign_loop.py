"""A loop of your own trains ShuffleNet on made-up images.

`horovodrun -np 2 python examples/foreign_loop.py`, or `torchrun --nproc-per-node 2 examples/foreign_loop.py`.
"""

import torch
import torch.nn.functional as F
from torchvision.datasets import FakeData
from torchvision.models import shufflenet_v2_x0_5
from torchvision.transforms import ToTensor

import hvd_lb as lb

world = lb.init()
data = FakeData(128, (3, 32, 32), num_classes=4, transform=ToTensor())
sampler = torch.utils.data.DistributedSampler(data, world.size, world.rank)  # world.size microbatches a step
loader = torch.utils.data.DataLoader(data, batch_size=16, sampler=sampler)
model = shufflenet_v2_x0_5(num_classes=4).to(memory_format=torch.channels_last)
schedule = lb.Schedule(0.1, global_batch=16 * world.size, steps_per_epoch=len(loader), epochs=8)
opt = lb.DistributedOptimizer(lb.SGD(lb.parameter_groups(model)), model, schedule=schedule)
for epoch in range(schedule.epochs):
    sampler.set_epoch(epoch)
    for images, labels in loader:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(images.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(outputs.float(), labels, reduction="sum")
        opt.backward(loss)
        opt.step(images=len(labels))
    if world.rank == 0:
        print(
            f"epoch {epoch}: loss {loss.item() / len(labels):.3f}, learning rate {schedule(opt.steps - 1):.4f}"
        )
