"""Data sets; `hvd_lb.data.loader`, which needs torch, turns their images into tensors."""

from hvd_lb.data.dataset import default_data, open_dataset
from hvd_lb.data.images import ArrayImages, Dataset, Images

__all__ = [
    "ArrayImages",
    "Dataset",
    "Images",
    "default_data",
    "open_dataset",
]
