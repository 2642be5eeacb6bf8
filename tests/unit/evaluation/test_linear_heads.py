"""Many linear heads at once: each is what it would be alone, and nothing is chosen by test labels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mae.errors import UserError
from mae.evaluation import linear_heads
from mae.evaluation.linear_heads import ProbeResult

CLASSES = 5


def blobs(
    spread: tuple[float, ...], views: int = 1, images: int = 100, dim: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One kind of feature for each spread around the class centres, that of the kind: train, labels, test, labels."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, len(spread), dim, generator=draw)
    scale = torch.tensor(spread)[:, None]
    labels = torch.arange(images) % CLASSES
    train = centres[labels] + scale * torch.randn(views, images, len(spread), dim, generator=draw)
    return train, labels, centres[labels] + scale * torch.randn(images, len(spread), dim, generator=draw), labels


def probe(data: tuple[Tensor, Tensor, Tensor, Tensor], **settings: Any) -> ProbeResult:
    return linear_heads.probe(*data, CLASSES, **{"epochs": 10, "batch_size": 16} | settings)


def only(data: tuple[Tensor, Tensor, Tensor, Tensor], kind: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return data[0][:, :, [kind]], data[1], data[2][:, [kind]], data[3]


def test_separated_classes_are_told_apart() -> None:
    data = blobs((0.05,))
    found = probe(data)
    assert found.held_out.shape == (1, len(linear_heads.RATES))
    assert found.test == [100]
    assert torch.equal(found.logits.argmax(dim=1), data[3])


def test_the_good_kind_is_chosen_over_noise() -> None:
    found = probe(blobs((1e6, 0.05, 1.0)))
    assert found.chosen == 1
    assert found.test[1] == 100
    assert found.test[0] < 45
    assert found.held_out[0].max() < 100 == found.held_out[1].max()


def test_scale_and_offset_of_a_feature_do_not_matter() -> None:
    train, labels, test, test_labels = blobs((1.0,))
    scale, offset = torch.logspace(-2, 2, 8), torch.linspace(-30, 30, 8)
    plain = probe((train, labels, test, test_labels))
    moved = probe((train * scale + offset, labels, test * scale + offset, test_labels))
    assert torch.allclose(plain.held_out, moved.held_out)
    assert torch.equal(plain.logits.argmax(dim=1), moved.logits.argmax(dim=1))


def test_a_head_is_what_it_would_be_alone() -> None:
    data = blobs((0.7, 1.0, 2.0), views=2)
    rates = [0.01, 0.1, 1.0]
    together = probe(data, rates=rates)
    assert len(together.held_out.unique()) > 3  # the heads do differ
    for kind in range(3):
        for index, rate in enumerate(rates):
            alone = probe(only(data, kind), rates=[rate])
            assert alone.held_out.item() == pytest.approx(together.held_out[kind, index].item(), abs=1e-3)
            if rate == together.best_rate[kind]:
                assert alone.test[0] == pytest.approx(together.test[kind], abs=1e-3)
    chosen = only(data, together.chosen)
    assert torch.equal(probe(chosen, rates=rates).logits.argmax(dim=1), together.logits.argmax(dim=1))


def test_a_step_is_that_of_autograd_and_torch_sgd() -> None:
    data = blobs((0.7, 2.0))
    rows, rates = torch.arange(100), torch.tensor([[0.1, 1.0], [0.1, 1.0]])
    found = linear_heads.fit(data[0], data[1], rows, rates, CLASSES, epochs=3, batch_size=100, seed=0, device="cpu")
    start = linear_heads.fit(data[0], data[1], rows, rates, CLASSES, epochs=0, batch_size=100, seed=0, device="cpu")
    inputs = linear_heads.standardised(start, data[0][0])[1]  # (n, D + 1) of the second kind
    assert torch.allclose(inputs[:, :-1].mean(dim=0), torch.zeros(8), atol=1e-5)
    assert torch.allclose(inputs[:, :-1].std(dim=0, correction=0), torch.ones(8), atol=1e-4)
    weight = start.weight[1, :, 1].clone().requires_grad_()  # of rate 1
    optimizer = torch.optim.SGD([weight], momentum=0.9)
    for rate in (1.0, 0.75, 0.25):  # a cosine to 0: (1 + cos(pi / 3)) / 2 is 0.75
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        penalty = linear_heads.PENALTY / 2 * weight[:-1].square().sum() / 100
        (torch.nn.functional.cross_entropy(inputs @ weight, data[1]) + penalty).backward()
        optimizer.step()
    assert torch.allclose(found.weight[1, :, 1], weight, atol=1e-5)


def test_test_labels_are_used_for_the_accuracy_alone() -> None:
    train, labels, test, test_labels = blobs((0.7, 1.0))
    right, wrong = probe((train, labels, test, test_labels)), probe((train, labels, test, (test_labels + 1) % CLASSES))
    assert torch.equal(right.held_out, wrong.held_out)
    assert torch.equal(right.logits.argmax(dim=1), wrong.logits.argmax(dim=1))
    assert (right.best_rate, right.chosen) == (wrong.best_rate, wrong.chosen)
    assert right.test[right.chosen] > 60
    assert wrong.test[wrong.chosen] < 20


def test_the_split_is_stratified_and_deterministic() -> None:
    labels = torch.tensor([0] * 100 + [1] * 2 + [2] * 30)[
        torch.randperm(132, generator=torch.Generator().manual_seed(1))
    ]
    fitted, held_out = linear_heads.stratified_split(labels, 3, 0.1, seed=0)
    assert sorted([*fitted.tolist(), *held_out.tolist()]) == list(range(132))
    assert labels[held_out].bincount().tolist() == [10, 1, 3]
    assert labels[fitted].bincount().tolist() == [90, 1, 27]
    assert torch.equal(held_out, linear_heads.stratified_split(labels, 3, 0.1, seed=0)[1])
    assert set(held_out.tolist()) != set(linear_heads.stratified_split(labels, 3, 0.1, seed=1)[1].tolist())
    assert labels[linear_heads.stratified_split(labels, 3, 0.99, seed=0)[0]].bincount().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 0, 1, 2, 2], r"class 1 .*\(1\)"), ([0, 0, 1, 1], r"class 2 .*\(0\)")]
)
def test_a_class_of_fewer_than_two_images_is_told(labels: list[int], message: str) -> None:
    features = torch.zeros(1, len(labels), 1, 4)
    with pytest.raises(UserError, match=message):
        linear_heads.probe(features, torch.tensor(labels), features[0], torch.tensor(labels), 3)


def test_views_of_an_image_stay_together() -> None:
    # Labels at random, and features that only recognise an image: whoever has seen one view knows the others.
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % CLASSES
    train = torch.randn(100, 1, 200, generator=draw).expand(4, 100, 1, 200)
    found = probe((train, labels, train[0], labels), epochs=20)
    assert found.test == [100]
    assert found.held_out.max() < 60


def test_all_views_are_trained_on_and_held_out() -> None:
    train, labels, test, test_labels = blobs((0.05,), views=2)
    other = torch.stack([train[0], train[1].flip(2)])  # the second view is another kind of picture
    tests = torch.cat([test, test.flip(2)]), torch.cat([test_labels, test_labels])
    both, first = (probe((views, labels, *tests), epochs=40) for views in (other, other[:1]))
    assert both.test[0] > 90 > first.test[0]
    assert both.held_out.max() > 90


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    first = probe(blobs((1.0,)))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    again = probe(blobs((1.0,)))
    assert torch.equal(first.held_out, again.held_out)
    assert torch.equal(first.logits.argmax(dim=1), again.logits.argmax(dim=1))


@pytest.mark.parametrize(
    "setting", [{"epochs": 40}, {"rates": [0.03, 0.5]}, {"batch_size": 90}, {"holdout": 0.5}, {"seed": 1}]
)
def test_every_setting_has_an_effect(setting: dict[str, Any]) -> None:
    data = blobs((1.5, 2.0), images=200)
    plain = probe(data)
    changed = probe(data, **setting)
    assert not torch.equal(plain.held_out, changed.held_out)
    if "holdout" not in setting:
        assert not torch.equal(plain.logits.argmax(dim=1), changed.logits.argmax(dim=1))


def test_the_end_of_the_grid_is_seen() -> None:
    data = blobs((0.7, 1.0))
    assert probe(data, rates=[1e-9, 0.1, 1e-8]).at_grid_end == [True, True]
    assert probe(data, rates=[1e-9, 0.1, 1e5]).best_rate == [0.1, 0.1]
    assert probe(data, rates=[1e-9, 0.1, 1e5]).at_grid_end == [False, False]
    assert probe(data, rates=[0.1]).at_grid_end == [False, False]


def test_predictions_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = probe(blobs((1.0, 2.0), views=2))
    monkeypatch.setattr(linear_heads, "CHUNK", 7)
    monkeypatch.setattr(linear_heads, "LOGITS", 3 * 2 * len(linear_heads.RATES) * CLASSES)
    parts = probe(blobs((1.0, 2.0), views=2))
    assert torch.allclose(whole.held_out, parts.held_out)
    assert torch.equal(whole.logits.argmax(dim=1), parts.logits.argmax(dim=1))
