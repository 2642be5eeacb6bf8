"""k-NN and the linear probe, against what can be worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from mae.data.datamodule import ImageData
from mae.evaluation import features
from mae.evaluation.features import Features


def blobs(spread: float) -> Features:
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=draw)
    labels = torch.arange(200) % 5
    train, test = (centres[labels] + spread * torch.randn(200, 16, generator=draw) for _ in range(2))
    return Features(train, labels, test, labels, 5)


def test_separated_classes_are_told_apart_and_mixed_ones_are_not() -> None:
    assert features.knn_accuracy(blobs(0.1)) == 100
    assert features.linear_probe(blobs(0.1))[0] == 100
    assert features.knn_accuracy(blobs(100.0)) < 40
    assert features.linear_probe(blobs(100.0))[0] < 40


def test_votes_weigh_exp_of_cosine_over_temperature() -> None:
    def at(degrees: float) -> list[float]:
        return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]

    # One neighbour of class 0 near by, two of class 1 further off.
    train = torch.tensor([at(10), at(40), at(-40)]) * torch.tensor([[1.0], [7.0], [0.1]])  # lengths do not matter
    found = Features(train, torch.tensor([0, 1, 1]), torch.tensor([at(0)]), torch.tensor([0]), 2)
    near, far = math.cos(math.radians(10)), math.cos(math.radians(40))
    assert math.exp(near / 0.07) > 2 * math.exp(far / 0.07)
    assert features.knn_accuracy(found, k=3, temperature=0.07) == 100
    assert math.exp(near / 10) < 2 * math.exp(far / 10)
    assert features.knn_accuracy(found, k=3, temperature=10) == 0
    assert features.knn_accuracy(found, k=1, temperature=10) == 100


def test_the_penalty_is_chosen_without_the_test_labels() -> None:
    found = blobs(1.0)
    wrong = found._replace(test_labels=(found.test_labels + 1) % 5)
    assert features.linear_probe(found)[1] == features.linear_probe(wrong)[1]


def test_features_are_standardised_with_training_statistics() -> None:
    data = ImageData("digits", num_workers=0, batch_size_per_device=500)
    plain = features.extract_splits(lambda images: images.flatten(1), data, torch.device("cpu"))
    found = features.rescale(plain, "standardize")
    assert found.train.shape == (4000, 784)
    changing = found.train.std(dim=0) > 0
    assert torch.allclose(found.train[:, changing].std(dim=0), torch.ones(int(changing.sum())), atol=1e-3)
    assert found.train.mean(dim=0).abs().max() < 1e-3
    assert not found.train[:, ~changing].any()
    assert found.test.isfinite().all()
    assert 85 < features.knn_accuracy(found) < 92
    assert 92 < features.knn_accuracy(plain) < 97


def test_whitened_features_have_unit_covariance_and_forget_linear_maps() -> None:
    found = blobs(1.0)
    white = features.rescale(found, "whiten")
    assert torch.allclose(white.train.T @ white.train / len(white.train), torch.eye(16), atol=1e-4)
    mixing = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    mixed = found._replace(train=found.train @ mixing + 5, test=found.test @ mixing + 5)
    again = features.rescale(mixed, "whiten")
    assert torch.allclose(white.test @ white.train.T, again.test @ again.train.T, atol=1e-2)
    constant = found._replace(train=F.pad(found.train, (0, 1), value=3), test=F.pad(found.test, (0, 1), value=4))
    assert torch.allclose(features.rescale(constant, "whiten").test.norm(dim=1), white.test.norm(dim=1), atol=1e-3)


def test_pooling() -> None:
    tokens = torch.randn(2, 5, 3)
    assert torch.equal(features.POOLS["class"](tokens), tokens[:, 0])
    assert torch.equal(features.POOLS["mean"](tokens), tokens[:, 1:].mean(dim=1))
    assert torch.equal(features.POOLS["both"](tokens), torch.cat([tokens[:, 1:].mean(dim=1), tokens[:, 0]], dim=1))


@pytest.mark.parametrize("batch", [7, 1000])
def test_every_image_once_and_in_order_whatever_the_batch(batch: int) -> None:
    data = ImageData("digits", num_workers=0, batch_size_per_device=batch)
    _, test = data.require_labels()
    found, labels = features.extract_features(
        lambda images: images.flatten(1), data, data.whole(test), torch.device("cpu")
    )
    assert labels.tolist() == test.labels
    assert torch.allclose(found[17], ((test.open(17).pixels() / 255 - data.mean[0]) / data.std[0]).flatten(), atol=1e-5)  # type: ignore[index]
