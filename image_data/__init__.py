"""Image data for both wings, in numpy: IDX files, where data sets are found, standardisation, seeded batches."""

from image_data.batches import epoch_batches, epoch_order, padded_batches, steps_per_epoch
from image_data.dataset import ImageDataset, load_folder, read_images, read_labels
from image_data.idx import read_idx, write_idx
from image_data.sources import FASHION_MNIST_CLASSES, load_fashion_mnist, load_sample
from image_data.standardization import (
    FeatureStatistics,
    feature_statistics,
    pixel_mean_and_std,
    standardize,
    unstandardize,
)

__all__ = [
    "FASHION_MNIST_CLASSES",
    "FeatureStatistics",
    "ImageDataset",
    "epoch_batches",
    "epoch_order",
    "feature_statistics",
    "load_fashion_mnist",
    "load_folder",
    "load_sample",
    "padded_batches",
    "pixel_mean_and_std",
    "read_idx",
    "read_images",
    "read_labels",
    "standardize",
    "steps_per_epoch",
    "unstandardize",
    "write_idx",
]
