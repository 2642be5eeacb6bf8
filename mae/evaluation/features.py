"""Features of whole images from a frozen encoder; weighted k-NN and logistic regression on them."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.data.datamodule import ImageData, raise_errors
from mae.data.datasets import Batch
from mae.errors import UserError

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

Scaling = Literal["standardize", "whiten"]

INVERSE_PENALTIES = tuple(10.0**e for e in range(-5, 2))  # scikit-learn's C


class Features(NamedTuple):
    """The features of a data set's training and test images."""

    train: Tensor  # (n, D) float32 on the CPU
    train_labels: Tensor  # (n,) int64
    test: Tensor  # (m, D)
    test_labels: Tensor  # (m,)
    num_classes: int


def mean_of_patches(tokens: Tensor, prefix: int = 1) -> Tensor:
    """(B, prefix + N, D) -> (B, D), without the class token or whatever tokens stand before the patches."""
    return tokens[:, prefix:].mean(dim=1)


# Tokens (B, prefix + N, D) and the number of those before the patches -> (B, D), or (B, 2 * D) for both.
POOLS: dict[str, Callable[..., Tensor]] = {
    "mean": mean_of_patches,
    "class": lambda tokens, prefix=1: tokens[:, 0],
    "both": lambda tokens, prefix=1: torch.cat([mean_of_patches(tokens, prefix), tokens[:, 0]], dim=1),
}


def pooled(encoder: VisionTransformer, pool: str) -> Callable[[Tensor], Tensor]:
    """The function (B, C, H, W) -> (B, D), or (B, 2 * D), of images to features.

    Args:
        pool: One of POOLS.

    Raises:
        UserError: The encoder has no class token, which the pool takes.
    """
    check_pool(encoder, pool)
    return lambda images: POOLS[pool](encoder.forward_features(images), encoder.num_prefix_tokens)


def check_pool(encoder: VisionTransformer, pool: str) -> None:
    if pool != "mean" and encoder.cls_token is None:
        raise UserError(f"pool {pool}: this encoder has no class token; use mean")


def multi_layer_features(
    encoder: VisionTransformer, layers: Sequence[int], pools: Sequence[str]
) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    """Features of several layers and pools from one forward pass.

    Args:
        layers: Blocks counted from the end: -1 is the last. The encoder's final norm is applied to each.
        pools: Keys of POOLS whose features have the same width.

    Returns:
        The names of the F features, and a function (B, C, H, W) -> (B, F, D) that computes them.

    Raises:
        ValueError: There is no such layer.
        UserError: The encoder has no class token, which a pool takes.
    """
    for pool in pools:
        check_pool(encoder, pool)
    depth = len(encoder.blocks)
    if not layers or not all(-depth <= layer <= -1 for layer in layers):
        raise ValueError(f"layers {list(layers)}: -1 is the last block and -{depth} the first")
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
        count = encoder.num_prefix_tokens
        if count:
            tokens = [torch.cat([prefix, patches], dim=1) for patches, prefix in tokens]  # type: ignore[misc, str-unpack, list-item]
        layers_tokens = cast(list[Tensor], tokens)
        return torch.stack([POOLS[pool](t, count) for t in layers_tokens for pool in pools], dim=1)

    return names, encode


@torch.no_grad()
def extract_features(
    encode: Callable[[Tensor], Tensor],
    data: ImageData,
    batches: Iterable[Batch],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Features (n, ...) and labels (n,) of all images, in their order; `encode` takes normalised (B, C, H, W)."""
    features, labels = [], []
    for batch in batches:
        raise_errors(batch)
        images = data.prepare(batch._replace(images=batch.images.to(device), flip=batch.flip.to(device))).images
        features.append(encode(images).float().cpu())
        labels.append(batch.labels)
    return torch.cat(features), torch.cat(labels)


def extract_splits(encode: Callable[[Tensor], Tensor], data: ImageData, device: torch.device) -> Features:
    """Features of the labelled training and held-out images."""
    train_source, test_source = data.require_labels()
    data.setup("predict")
    train, train_labels = extract_features(encode, data, data.whole(train_source), device)
    test, test_labels = extract_features(encode, data, data.whole(test_source), device)
    return Features(train, train_labels, test, test_labels, len(train_source.classes))


def rescale(features: Features, scaling: Scaling) -> Features:
    """Rescale features by statistics of the training images; labels are not used.

    Args:
        scaling: "standardize": each feature has mean 0 and std 1; "whiten": their covariance is the identity, so that
            cosines do not depend on the few directions in which images differ most (brightness, contrast).
    """
    train = features.train - (mean := features.train.mean(dim=0))
    if scaling == "standardize":
        variance, matrix = train.square().mean(dim=0), None
    else:
        variance, matrix = torch.linalg.eigh(train.double().T @ train.double() / len(train))
    # A direction that hardly varies over the training images carries only noise: it becomes 0.
    scale = torch.where(variance > 1e-10 * variance.max(), variance.rsqrt(), 0.0)
    if matrix is None:
        return features._replace(train=train * scale, test=(features.test - mean) * scale)
    matrix = (matrix * scale).float()
    return features._replace(train=train @ matrix, test=(features.test - mean) @ matrix)


def effective_rank(features: Tensor) -> float:
    """(n, D) -> 1 to min(n, D): over how many directions features spread; exp of the entropy of their singular values.

    RankMe, arXiv:2210.02885, eq. 1: without labels it tells good encoders from collapsed ones.
    """
    squares = torch.linalg.eigvalsh(features.double().T @ features.double())
    values = squares.clamp(min=0).sqrt()
    shares = values / values.sum() + 1e-7
    return float((-shares * shares.log()).sum().exp())


def knn_accuracy(features: Features, k: int = 20, temperature: float = 0.07, chunk: int = 1024) -> float:
    """Accuracy in percent of weighted k-NN: the k nearest images by cosine vote with exp(cosine / temperature)."""
    train = F.normalize(features.train)
    predictions = []
    for test in F.normalize(features.test).split(chunk):
        cosine, nearest = (test @ train.T).topk(min(k, len(train)), dim=1)  # (chunk, k)
        weight = ((cosine - cosine[:, :1]) / temperature).exp()  # relative to the nearest: nothing overflows
        votes = torch.zeros(len(test), features.num_classes)
        predictions.append(votes.scatter_add_(1, features.train_labels[nearest], weight).argmax(dim=1))
    return percent_correct(torch.cat(predictions), features.test_labels)


def knn_scores(features: Features, k: int = 20, temperature: float = 0.07) -> dict[str, float]:
    """Accuracy in percent of k-NN by its names, the same in every place.

    `knn`: cosines of the features as they are, as in the literature (Wu et al. 2018, arXiv:1805.01978; DINO,
    arXiv:2104.14294). `knn_whitened`: of whitened features (`rescale`).
    """
    whitened = rescale(features, "whiten")
    return {
        "knn": knn_accuracy(features, k, temperature),
        "knn_whitened": knn_accuracy(whitened, k, temperature),
    }


def linear_probe(features: Features) -> tuple[float, float]:
    """Logistic regression on standardised features: accuracy in percent, and the inverse penalty C that was chosen.

    C is chosen on every fifth training image, held out for that; the final fit is on all training images. Test labels
    are used only for the accuracy.
    """
    features = rescale(features, "standardize")
    held_out = torch.arange(len(features.train)) % 5 == 4
    fit, check = features.train[~held_out], features.train[held_out]
    fit_labels, check_labels = features.train_labels[~held_out], features.train_labels[held_out]
    scores = {
        c: logistic_regression(c, fit, fit_labels).score(check.numpy(), check_labels.numpy()) for c in INVERSE_PENALTIES
    }
    best = max(scores, key=lambda c: (scores[c], -c))
    predictions = logistic_regression(best, features.train, features.train_labels).predict(features.test.numpy())
    return percent_correct(torch.from_numpy(predictions), features.test_labels), best


def logistic_regression(c: float, features: Tensor, labels: Tensor) -> "LogisticRegression":
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # weak penalties stop at max_iter: early stopping
        return LogisticRegression(C=c, max_iter=300).fit(features.numpy(), labels.numpy())


def percent_correct(predictions: Tensor, labels: Tensor) -> float:
    return 100 * int((predictions == labels).sum()) / len(predictions)
