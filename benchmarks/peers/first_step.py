"""A stock Horovod script up to its first steps, as Horovod's own ImageNet example: `first_step.py DATA MODEL SIZE`."""

import sys

import horovod.torch as hvd
import torch
from torchvision import datasets, models, transforms

data, model_name, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
hvd.init()
torch.set_num_threads(1)
images = datasets.ImageFolder(
    f"{data}/train",
    transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    ),
)
sampler = torch.utils.data.DistributedSampler(images, hvd.size(), hvd.rank())
loader = torch.utils.data.DataLoader(images, batch_size=8, sampler=sampler)
model = models.get_model(model_name, num_classes=len(images.classes))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
for x, y in loader:
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    if hvd.rank() == 0:
        print("first step", flush=True)
