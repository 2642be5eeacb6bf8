"""Linear probes of many features at once: one head for each feature and learning rate, all trained together.

Shapes: V views (crops) of each of n training images, m test images, F features (layer x pool) of D dimensions each,
R learning rates, C classes, B images of a batch or chunk.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mae.errors import UserError

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)

MOMENTUM = 0.9

PENALTY = 3.0  # L2: PENALTY / 2 * |w|^2 is added to the loss summed over the images, as 1 / C of a logistic regression

EPS = 1e-6  # added to the variance, as in the BatchNorm of the paper's probe (appendix A.1)

CHUNK = 4096  # images processed at once outside training

LOGITS = 2**24  # logits held at once outside training: 64 MiB


class ProbeResult(NamedTuple):
    """Accuracies of the heads: top-1 in percent."""

    rates: list[float]  # (R,) the grid
    held_out: Tensor  # (F, R) accuracy on the held-out training images, over all their views
    best_rate: list[float]  # (F,) the rate of the best held-out accuracy; the first of equals
    test: list[float]  # (F,) accuracy of the head with the best rate, trained anew on all training images
    chosen: int  # the feature of the best held-out accuracy; the first of equals
    heads: "Heads"  # (F, D + 1, 1, C), trained on all training images
    features: Tensor  # (m, F, D) of the test images

    def logits_in_parts(self) -> Iterator[Tensor]:
        """(k, C) each, of the chosen feature's head on the test images in their order; all at once can be gigabytes."""
        for part in torch.arange(len(self.features)).split(chunk_size(self.heads)):
            yield logits(self.heads, standardised(self.heads, self.features[part]))[self.chosen, :, 0].cpu()

    @property
    def logits(self) -> Tensor:
        """(m, C)"""
        return torch.cat(list(self.logits_in_parts()))

    @property
    def at_grid_end(self) -> list[bool]:
        """(F,) whether the best rate is at an end of the grid, so that one beyond it may be better still."""
        return [len(self.rates) > 1 and rate in (min(self.rates), max(self.rates)) for rate in self.best_rate]


class Heads(NamedTuple):
    """F x R linear heads and the standardisation before them."""

    mean: Tensor  # (F, 1, D)
    scale: Tensor  # (F, 1, D)
    weight: Tensor  # (F, D + 1, R, C), the bias last


def probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    num_classes: int,
    *,
    rates: Sequence[float] = RATES,
    epochs: int = 50,
    batch_size: int = 256,
    holdout: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ProbeResult:
    """Train linear heads on frozen features; each feature's rate is chosen on held-out training images, then tested.

    SGD with momentum and a cosine schedule to 0. A low rate regularises; a weak L2 penalty keeps high rates from
    overfitting few images. Compared with logistic regression with a tuned penalty, it is within 0.4 points on
    CIFAR-10; on 4,000 digits within 0.6 in cross-validation and 0.2 to 1.4 below on the 1,000 test digits (400 images
    choose the rate there). LARS and Adam were no better. Test labels are used only for `test`.

    Args:
        train: (V, n, F, D) float32. All views of an image are on the same side of the held-out split; each epoch draws
            one of them.
        train_labels: (n,) int64 in [0, C), on the CPU.
        test: (m, F, D) float32.
        test_labels: (m,) int64, on the CPU.
        num_classes: C.
        rates: Learning rates, at least one, above 0, for the mean loss over a batch of any size.
        epochs: Passes over the training images, at least 1.
        batch_size: Images of an optimiser step, at most; an epoch is split into equal batches.
        holdout: Fraction of each class to hold out, in (0, 1); at least 1 image, and at least 1 stays.
        seed: Seed of the split, initial weights, order and views.
        device: Where the heads are trained; features are moved there batch by batch.

    Raises:
        UserError: A class has fewer than 2 training images.
    """
    fit_rows, held_out = stratified_split(train_labels, num_classes, holdout, seed)
    grid = torch.tensor(rates, dtype=torch.float32).expand(train.shape[2], -1)  # (F, R)
    recipe = (num_classes, epochs, batch_size, seed, device)
    heads = fit(train, train_labels, fit_rows, grid, *recipe)
    labels = train_labels[held_out]
    scores = torch.stack([accuracy(predict(heads, view, held_out), labels) for view in train]).mean(dim=0)  # (F, R)
    best = scores.argmax(dim=1, keepdim=True)  # (F, 1)
    chosen = int(scores.amax(dim=1).argmax())

    heads = fit(train, train_labels, torch.arange(len(train_labels)), grid.gather(1, best), *recipe)
    rows = torch.arange(len(test))
    predictions = predict(heads, test, rows)  # (m, F, 1)
    return ProbeResult(
        rates=list(rates),
        held_out=scores,
        best_rate=[rates[index] for index in best.flatten().tolist()],
        test=accuracy(predictions, test_labels).flatten().tolist(),
        chosen=chosen,
        heads=heads,
        features=test,
    )


def fit_and_score(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    num_classes: int,
    rate: float,
    epochs: int,
    device: torch.device | str = "cpu",
) -> float:
    """Accuracy in percent of one head trained at one fixed rate: train (n, D), test (m, D)."""
    rates = torch.tensor([[rate]])
    rows = torch.arange(len(train_labels))
    heads = fit(train[None, :, None], train_labels, rows, rates, num_classes, epochs, 256, 0, device)
    return float(accuracy(predict(heads, test[:, None], torch.arange(len(test))), test_labels))


def stratified_split(labels: Tensor, num_classes: int, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split each class into images to fit on and a fraction `holdout` of images to choose on; returns their indices."""
    counts = labels.bincount(minlength=num_classes)
    if (counts < 2).any():
        label = int((counts < 2).nonzero()[0])
        raise UserError(
            f"class {label} has too few training images ({int(counts[label])}): the linear probe needs at least 2, one "
            "of them to choose the learning rate; add images of the class or leave it out"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # class by class, shuffled within the class
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)  # within the class
    quota = (holdout * counts).round().long().clamp(min=1).minimum(counts - 1)
    held_out = rank < quota.repeat_interleave(counts)
    return order[~held_out], order[held_out]


@torch.no_grad()
def fit(
    train: Tensor,
    labels: Tensor,
    rows: Tensor,
    rates: Tensor,
    num_classes: int,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device | str,
) -> Heads:
    """Train F x R heads on the images `rows` of `train`; rates (F, R).

    Every head starts from the same weights and sees the same batches, and the losses are added, so that each head is
    trained as it would be alone. The gradient of softmax cross-entropy, (softmax - one-hot) times features, is written
    out.
    """
    draw = torch.Generator().manual_seed(seed)
    views, _, features, dim = train.shape
    weight = F.pad(0.01 * torch.randn(dim, 1, num_classes, generator=draw), (0, 0, 0, 0, 0, 1))  # the bias is 0
    weight = weight.to(device).expand(features, dim + 1, rates.shape[1], num_classes).contiguous()
    heads = Heads(*standardization(train, rows, device), weight)
    velocity = torch.zeros_like(weight)
    rates = rates.to(device)[:, None, :, None]  # (F, 1, R, 1)
    steps_per_epoch = math.ceil(len(rows) / batch_size)
    for epoch in range(epochs):
        order = rows[torch.randperm(len(rows), generator=draw)].tensor_split(steps_per_epoch)
        view = torch.randint(views, (len(rows),), generator=draw).tensor_split(steps_per_epoch)
        for step in range(steps_per_epoch):
            batch = order[step]
            inputs = standardised(heads, train[view[step], batch])  # (F, B, D + 1)
            error = logits(heads, inputs).softmax(dim=3)  # (F, B, R, C)
            error[:, torch.arange(len(batch)), :, labels[batch]] -= 1
            velocity.flatten(2).baddbmm_(inputs.mT, error.flatten(2), beta=MOMENTUM, alpha=1 / len(batch))
            velocity[:, :-1].add_(weight[:, :-1], alpha=PENALTY / len(rows))  # not the bias
            progress = (epoch + step / steps_per_epoch) / epochs
            weight.addcmul_(velocity, rates, value=-0.5 * (1 + math.cos(math.pi * progress)))
    return heads


def standardization(train: Tensor, rows: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Mean and 1 / std, each (F, 1, D), of the images `rows`, over all their views."""
    total = torch.zeros(2, *train.shape[2:], dtype=torch.float64)
    for view in train:
        for chunk in rows.split(CHUNK):
            values = view[chunk].double().cpu()
            total += torch.stack([values.sum(dim=0), values.square().sum(dim=0)])
    mean, square = total / (len(train) * len(rows))
    scale = ((square - mean.square()).clamp(min=0) + EPS).rsqrt()
    return mean.float().unsqueeze(1).to(device), scale.float().unsqueeze(1).to(device)


def standardised(heads: Heads, features: Tensor) -> Tensor:
    """(B, F, D) features -> (F, B, D + 1) on the heads' device: standardised, with a 1 for the bias."""
    features = features.to(heads.mean.device).transpose(0, 1)
    return F.pad((features - heads.mean) * heads.scale, (0, 1), value=1.0)


def logits(heads: Heads, inputs: Tensor) -> Tensor:
    """(F, B, D + 1) -> (F, B, R, C), all heads in one batched product."""
    return torch.bmm(inputs, heads.weight.flatten(2)).unflatten(2, heads.weight.shape[2:])


def chunk_size(heads: Heads) -> int:
    """Images whose logits are computed at once."""
    count, _, rates, classes = heads.weight.shape
    return min(CHUNK, max(1, LOGITS // (count * rates * classes)))


def predict(heads: Heads, features: Tensor, rows: Tensor) -> Tensor:
    """Predicted classes (k, F, R) of the images `rows` (k,) of features (n, F, D), in chunks; int64 on the CPU."""
    parts = rows.split(chunk_size(heads))
    predictions = [logits(heads, standardised(heads, features[part])).argmax(dim=3).cpu() for part in parts]
    return torch.cat(predictions, dim=1).transpose(0, 1)


def accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """(k, F, R) and labels (k,) -> (F, R), percent."""
    return 100 * (predictions == labels[:, None, None]).float().mean(dim=0)
