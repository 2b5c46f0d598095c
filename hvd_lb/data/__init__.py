"""Data sets and the loaders that turn their images into tensors."""

from hvd_lb.data.dataset import default_data, open_dataset
from hvd_lb.data.images import ArrayImages, Dataset, Images
from hvd_lb.data.loader import Loader, Pixels, open_loader

__all__ = [
    "ArrayImages",
    "Dataset",
    "Images",
    "Loader",
    "Pixels",
    "default_data",
    "open_dataset",
    "open_loader",
]
