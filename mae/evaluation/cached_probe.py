"""The fast linear probe: encode every image once, then train all heads together on the cached features."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.data.labelled import LabelledData
from mae.errors import UserError
from mae.evaluation import features, linear_heads
from mae.evaluation.metrics import Report, Scores


@dataclass
class CachedSettings:
    """The probe on cached features (`--mode cached`).

    Args:
        layers: Blocks whose output is probed, counted from the end: -1 is the last.
        pools: Features of each layer: the class token, the mean of patch tokens, or by itself `both` as one feature.
        crops: Random crops of each training image besides its centre crop.
        rates: Learning rates of the heads; the best one for each feature is chosen on the held-out images.
        epochs: Passes over the cached features.
        batch_size: Images of a step.
        holdout: Fraction of each class's training images on which rate, layer and pool are chosen; the final heads are
            trained on all training images.
    """

    layers: list[int] = field(default_factory=lambda: [-1])
    pools: list[Literal["class", "mean", "both"]] = field(default_factory=lambda: ["class", "mean"])
    crops: int = 0
    rates: list[float] = field(default_factory=lambda: list(linear_heads.RATES))
    epochs: int = 50
    batch_size: int = 256
    holdout: float = 0.1


class FeatureScore(NamedTuple):
    """The accuracy of one feature, in percent, with the rate that was chosen on training images."""

    feature: str
    rate: float
    at_end: bool  # of the grid of rates, so that one beyond it may be better
    held_out: float
    test: float


class CachedResult(NamedTuple):
    rows: list[FeatureScore]
    chosen: FeatureScore  # the best on the held-out training images
    report: Report  # of the chosen feature
    encoding: float  # seconds
    training: float  # seconds

    def table(self) -> str:
        lines = ["feature         rate     on held-out training images   on the held-out split"]
        for row in self.rows:
            mark = "  <- chosen" if row == self.chosen else ""
            mark += "  (the last of --cached.rates: one beyond it may be better)" if row.at_end else ""
            lines.append(f"{row.feature:<14} {row.rate:>6g} {row.held_out:>31.2f} {row.test:>23.2f}{mark}")
        return "\n".join(lines)


def recipe(settings: CachedSettings, data: LabelledData, start: str) -> str:
    """What the probe is going to do, for the user to read.

    Raises:
        UserError: There are no held-out images.
    """
    if data.train_source is None or data.val_source is None:
        raise UserError("a probe needs labelled held-out images: val/CLASS/* below --data.root, or --data.val_dir")
    crops = f"; {settings.crops} crops each: {'; '.join(data.augmentations())}" if settings.crops else ""
    layout = f"{data.layout}; " if data.layout else ""
    return "\n".join(
        [
            f"images        {len(data.train_source)} for training, {len(data.val_source)} held out; {layout}"
            f"rate, layer and pool are chosen on {settings.holdout:.0%} of each class's training images",
            f"features      {start}; layers {settings.layers}, pools {', '.join(settings.pools)}; centre crop{crops}",
            f"heads         SGD, {settings.epochs} epochs, batch {settings.batch_size}, rates {settings.rates}",
        ]
    )


def run_cached_probe(
    encoder: VisionTransformer, data: LabelledData, settings: CachedSettings, seed: int, device: torch.device
) -> CachedResult:
    """Probe a frozen encoder, whose final norm is applied to each layer.

    Raises:
        UserError: A setting is out of range, or a class has fewer than two training images.
    """
    assert data.train_source is not None
    assert data.val_source is not None
    names, encode = checked_features(encoder, data, settings)
    start = time.perf_counter()
    was_training = encoder.training
    encoder.to(device).eval()
    train, labels = features.extract_features(encode, data, data.whole(data.train_source), device)
    views = [train] + [
        features.extract_features(encode, data, data.crops(data.train_source, epoch), device)[0]
        for epoch in range(settings.crops)
    ]
    test, test_labels = features.extract_features(encode, data, data.whole(data.val_source), device)
    encoder.train(was_training)
    encoded = time.perf_counter()
    if not all(tensor.isfinite().all() for tensor in (*views, test)):
        raise UserError("the encoder gives features that are not finite: its weights are damaged")
    result = linear_heads.probe(
        torch.stack(views),
        labels,
        test,
        test_labels,
        len(data.classes),
        rates=settings.rates,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        holdout=settings.holdout,
        seed=seed,
        device=device,
    )
    best_held_out = result.held_out.max(dim=1).values.tolist()
    columns = (names, result.best_rate, result.at_grid_end, best_held_out, result.test)
    rows = [FeatureScore(*row) for row in zip(*columns, strict=True)]
    scores = Scores(len(data.classes))
    done = 0
    for logits in result.logits_in_parts():
        scores.update(logits, test_labels[done : done + len(logits)])
        done += len(logits)
    report = scores.report(data.classes)
    return CachedResult(rows, rows[result.chosen], report, encoded - start, time.perf_counter() - encoded)


def checked_features(
    encoder: VisionTransformer, data: LabelledData, settings: CachedSettings
) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    """`multi_layer_features` by the settings; nothing is computed yet.

    Raises:
        UserError: A setting is out of range, or a class has fewer than two training images.
    """
    if settings.crops < 0 or settings.epochs < 1 or settings.batch_size < 1 or not 0 < settings.holdout < 1:
        raise UserError(
            f"--cached.crops {settings.crops}, epochs {settings.epochs}, batch_size {settings.batch_size}, holdout "
            f"{settings.holdout}: must be at least 0, 1 and 1, and a fraction between 0 and 1"
        )
    if not settings.rates or min(settings.rates) <= 0 or not settings.pools:
        raise UserError(f"--cached.rates {settings.rates}, pools {settings.pools}: at least one each, rates above 0")
    if "both" in settings.pools and len(settings.pools) > 1:
        raise UserError(f"--cached.pools {settings.pools}: both is twice as wide as the others and must stand alone")
    assert data.train_source is not None
    counts = Counter(data.train_source.labels)
    if too_few := [(name, counts[i]) for i, name in enumerate(data.classes) if counts[i] < 2]:
        raise UserError(
            f"class {too_few[0][0]} has {too_few[0][1]} training image: the cached probe holds some of each class out "
            "to choose on (more --data.labels_per_class, or --mode recipe)"
        )
    try:
        return features.multi_layer_features(encoder, settings.layers, settings.pools)
    except ValueError as error:
        raise UserError(f"--cached.{error}") from None
