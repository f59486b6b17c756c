"""Real images that ship with a package: scikit-learn's digits, in the shape of CIFAR's."""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

TEST_IMAGES = 320  # five batches of 64; the rest of the 1797 is for training


@dataclass(frozen=True)
class Digits:
    """Images (count, 3, 32, 32) float32, mean 0, deviation 1; labels (count,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(seed: int = 0) -> Digits:
    """1797 digits of 8 x 8, enlarged to 32 x 32 in three equal channels, shuffled and split."""
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(digits, dtype=torch.int64)
    images = functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    images = ((images - images.mean()) / images.std()).repeat(1, 3, 1, 1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], labels[order]
    return Digits(
        images[TEST_IMAGES:], labels[TEST_IMAGES:], images[:TEST_IMAGES], labels[:TEST_IMAGES]
    )
