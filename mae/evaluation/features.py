"""Is the encoder any good? Features of whole images, weighted k-NN, and a linear probe on them."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.data.datamodule import ImageData, raise_errors
from mae.data.datasets import Batch

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

Scaling = Literal["none", "standardize", "whiten"]

STRENGTHS = tuple(10.0**e for e in range(-5, 2))  # of scikit-learn's C, the inverse of the L2 penalty


class Features(NamedTuple):
    """One data set's two splits, encoded."""

    train: Tensor  # (n, D) float32 on the CPU
    train_labels: Tensor  # (n,) int64
    test: Tensor  # (m, D)
    test_labels: Tensor  # (m,)
    num_classes: int


def mean_of_patches(tokens: Tensor) -> Tensor:
    """(B, 1 + N, D) -> (B, D), the class token left out."""
    return tokens[:, 1:].mean(dim=1)


def class_token(tokens: Tensor) -> Tensor:
    """(B, 1 + N, D) -> (B, D)."""
    return tokens[:, 0]


def mean_and_class(tokens: Tensor) -> Tensor:
    """(B, 1 + N, D) -> (B, 2 * D)."""
    return torch.cat([mean_of_patches(tokens), class_token(tokens)], dim=1)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": mean_of_patches,
    "class": class_token,
    "both": mean_and_class,
}


def multi_layer_features(
    encoder: VisionTransformer, layers: Sequence[int], pools: Sequence[str]
) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    """Several features of one pass: their names, and (B, C, H, W) -> (B, F, D), a feature for each layer and pool.

    Args:
        layers: Blocks counted from the end: -1 is the last. The encoder's final norm is applied to each.
        pools: Of POOLS; all of one width.

    Raises:
        ValueError: There is no such layer.
    """
    depth = len(encoder.blocks)
    if not layers or not all(-depth <= layer <= -1 for layer in layers):
        raise ValueError(f"layers {list(layers)}: wanted are -1, the last block, down to -{depth}, the first")
    order = sorted(set(layers))  # as the encoder passes them
    names = [f"layer {layer} {pool}" for layer in order for pool in pools]

    def encode(images: Tensor) -> Tensor:
        tokens = encoder.forward_intermediates(
            images,
            indices=[depth + layer for layer in order],
            norm=True,
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        whole = [torch.cat([prefix, patches], dim=1) for patches, prefix in tokens]  # type: ignore[misc, str-unpack, list-item]
        return torch.stack([POOLS[pool](t) for t in whole for pool in pools], dim=1)

    return names, encode


@torch.no_grad()
def extract(
    encode: Callable[[Tensor], Tensor],
    data: ImageData,
    batches: Iterable[Batch],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Features (n, ...) and labels (n,) of every image, in order; `encode` takes (B, C, H, W), normalised."""
    features, labels = [], []
    for batch in batches:
        raise_errors(batch)
        images = data.prepare(batch._replace(images=batch.images.to(device), flip=batch.flip.to(device))).images
        features.append(encode(images).float().cpu())
        labels.append(batch.labels)
    return torch.cat(features), torch.cat(labels)


def extract_splits(encode: Callable[[Tensor], Tensor], data: ImageData, device: torch.device) -> Features:
    """Features of both labelled splits."""
    train_source, test_source = data.require_labels()
    data.setup("predict")
    train, train_labels = extract(encode, data, data.whole(train_source), device)
    test, test_labels = extract(encode, data, data.whole(test_source), device)
    return Features(train, train_labels, test, test_labels, len(train_source.classes))


def scaled(features: Features, how: Scaling) -> Features:
    """Features in another scale, fitted on the training images, labels unused.

    Args:
        how: "none"; "standardize": each feature has mean 0 and std 1; "whiten": their covariance is the identity, so
            that cosines do not hang on the few directions in which all images differ most (brightness, contrast).
    """
    if how == "none":
        return features
    train = features.train - (mean := features.train.mean(dim=0))
    if how == "standardize":
        variance, matrix = train.square().mean(dim=0), None
    else:
        variance, matrix = torch.linalg.eigh(train.double().T @ train.double() / len(train))
    # A direction that hardly changes in training says nothing: it becomes 0, instead of its noise being blown up.
    scale = torch.where(variance > 1e-10 * variance.max(), variance.rsqrt(), 0.0)
    if matrix is None:
        return features._replace(train=train * scale, test=(features.test - mean) * scale)
    matrix = (matrix * scale).float()
    return features._replace(train=train @ matrix, test=(features.test - mean) @ matrix)


def knn(features: Features, k: int = 20, temperature: float = 0.07, chunk: int = 1024) -> float:
    """Accuracy in percent of weighted k-NN: the k nearest by cosine vote with exp(cosine / temperature)."""
    train = F.normalize(features.train)
    predictions = []
    for test in F.normalize(features.test).split(chunk):
        cosine, nearest = (test @ train.T).topk(min(k, len(train)), dim=1)  # (chunk, k)
        weight = ((cosine - cosine[:, :1]) / temperature).exp()  # relative to the nearest: nothing overflows
        votes = torch.zeros(len(test), features.num_classes)
        predictions.append(votes.scatter_add_(1, features.train_labels[nearest], weight).argmax(dim=1))
    return accuracy(torch.cat(predictions), features)


def linear_probe(features: Features) -> tuple[float, float]:
    """Accuracy in percent of logistic regression on standardised features, and the strength C that was chosen.

    C is chosen on every fifth training image, held out for it; the final fit is on all of them. Test labels are
    used for nothing but the accuracy.
    """
    features = scaled(features, "standardize")
    held_out = torch.arange(len(features.train)) % 5 == 4
    fit, check = features.train[~held_out], features.train[held_out]
    fit_labels, check_labels = features.train_labels[~held_out], features.train_labels[held_out]
    scores = {c: logistic(c, fit, fit_labels).score(check.numpy(), check_labels.numpy()) for c in STRENGTHS}
    best = max(scores, key=lambda c: (scores[c], -c))
    predictions = logistic(best, features.train, features.train_labels).predict(features.test.numpy())
    return accuracy(torch.from_numpy(predictions), features), best


def logistic(strength: float, features: Tensor, labels: Tensor) -> "LogisticRegression":
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # weak penalties stop at max_iter: early stopping
        return LogisticRegression(C=strength, max_iter=300).fit(features.numpy(), labels.numpy())


def accuracy(predictions: Tensor, features: Features) -> float:
    right = int((predictions == features.test_labels).sum())
    return 100 * right / len(predictions)
