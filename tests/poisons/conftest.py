"""Real images for the poisons' acceptance tests: a shard of CIFAR-10 if one lies beside the checkout, else bundled."""

from pathlib import Path

import pytest
import torch

from poisonshield.batch import Batch
from poisonshield.data import open_dataset, read_batch

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def mini() -> Batch:
    """2,000 bundled CIFAR-10 training images, 200 of each class or nearly."""
    source = open_dataset("cifar10-mini", "train")
    return read_batch(source, torch.arange(2000))


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory) -> Batch:
    """5,000 real CIFAR-10 images: a shard of the full set, imported as a user would, or the bundled sample."""
    from poisonshield.data.importer import import_data

    source = open_dataset("cifar10-mini", "train")
    if (SHARED / "cifar10" / "manifest.json").is_file():
        out = tmp_path_factory.mktemp("cifar10")
        manifests = import_data(SHARED / "cifar10", out, pattern="*train-00003*")
        source = open_dataset(out / next(iter(manifests)))
    return read_batch(source, torch.arange(len(source)))


def build(cls, batch, *, seed=0, num_classes=10, **settings):
    """A fitted poison for the images of a batch."""
    poison = cls(cls.Config(**settings), num_classes=num_classes, image_size=tuple(batch.x.shape[2:]), seed=seed)
    poison.fit([batch])
    return poison


@pytest.fixture(scope="session")
def built():
    return build


def ridge_accuracy(train, labels, test, test_labels, *, strength=1e-3):
    """Percent right of a one-hot ridge regression with bias on flattened float64 inputs: an oracle without our code."""
    h = torch.cat([train.flatten(1).double(), torch.ones(len(train), 1, dtype=torch.float64)], dim=1)
    scale = strength * h.square().sum() / h.shape[1]
    target = torch.nn.functional.one_hot(labels, 10).double()
    weight = torch.linalg.solve(h.T @ h + scale * torch.eye(h.shape[1], dtype=torch.float64), h.T @ target)
    wide = torch.cat([test.flatten(1).double(), torch.ones(len(test), 1, dtype=torch.float64)], dim=1)
    return 100.0 * ((wide @ weight).argmax(1) == test_labels).double().mean().item()


@pytest.fixture(scope="session")
def linear_accuracy():
    return ridge_accuracy
