"""Schedules, parameter groups and LARS against the official figures."""

import json
from typing import Any

import pytest
import torch
from conftest import REFERENCE, reference
from torch import nn

from mae.errors import UserError
from mae.models.vit import build
from mae.training import recipe_audit
from mae.training.optim import WarmupCosine, adamw_by_layer, lars, scaled_lr
from mae.training.recipe_audit import ExpectedGroups

RECIPE: dict[str, Any] = json.loads((REFERENCE / "recipe.json").read_text())
TINY = {"image_size": [8, 8], "patch_size": [4, 4], "in_chans": 1, "embed_dim": 16, "depth": 3, "num_heads": 2}
SETTINGS = {  # base_lr, images a step, epochs, warm-up, min_lr
    "pretrain_800e_b4096": (1.5e-4, 4096, 800, 40, 0.0),
    "finetune_100e_b1024": (5e-4, 1024, 100, 5, 1e-6),
    "linprobe_90e_b16384": (0.1, 16384, 90, 10, 0.0),
}


def vit(pool: Any = "class", **settings: Any) -> Any:
    return build({**TINY, "mlp_ratio": 4.0}, 5, pool, "linear", **settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_official_learning_rates(name: str) -> None:
    base_lr, images, epochs, warmup, min_lr = SETTINGS[name]
    peak = scaled_lr(base_lr, images)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = WarmupCosine(optimizer, 1000, epochs, warmup, min_lr)  # a step is a thousandth of an epoch
    for epoch, rate in RECIPE[name]:
        assert abs(schedule.lr_at(round(1000 * epoch), peak) - rate) <= 1e-6 * peak, epoch


def test_a_run_may_be_all_warm_up() -> None:
    schedule = WarmupCosine(torch.optim.SGD([torch.zeros(1)], lr=1.0), 100, epochs=0.01, warmup_epochs=0.01)
    assert [schedule.lr_at(step, 2.0) for step in (0, 1)] == [0, 0]


def test_official_layer_scales_reach_the_learning_rates() -> None:
    network = vit()
    optimizer = adamw_by_layer(network, 1.0, 0.05, (0.9, 0.999), 0.65)
    schedule = WarmupCosine(optimizer, 10, epochs=5, warmup_epochs=1, min_lr=0.1)
    for _ in range(23):
        optimizer.step()
        schedule.step()
    unscaled = schedule.lr_at(23, 1.0)
    names = {id(p): name for name, p in network.named_parameters()}
    found = {
        names[id(p)]: (group["lr"] / unscaled, group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    wanted = RECIPE["layer_decay_depth3_0.65_wd0.05"]
    assert set(found) == set(wanted)
    for name, figures in wanted.items():
        assert found[name] == pytest.approx(figures, rel=1e-6), name


def test_mean_pooling_has_its_norm_in_the_top_layer() -> None:
    network = vit("mean")
    groups = adamw_by_layer(network, 1.0, 0.05, (0.9, 0.999), 0.65).param_groups
    top = {id(p) for group in groups if group["lr_scale"] == 1 for p in group["params"]}
    assert {id(p) for p in (*network.fc_norm.parameters(), *network.head.parameters())} == top


def test_four_official_lars_steps() -> None:
    tensors, _ = reference("lars")
    layer = nn.Linear(5, 7)
    layer.weight.data, layer.bias.data = tensors["w0"].clone(), tensors["b0"].clone()
    optimizer = lars(layer, 6.4, momentum=0.9, trust_coefficient=0.001)
    for step in range(4):
        layer.weight.grad, layer.bias.grad = tensors[f"gw{step}"].clone(), tensors[f"gb{step}"].clone()
        optimizer.step()
    for value, wanted in ((layer.weight, tensors["w4"]), (layer.bias, tensors["b4"])):
        assert (value - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize(("momentum", "trust"), [(0.5, 0.001), (0.9, 0.01)])
def test_settings_of_lars_have_an_effect(momentum: float, trust: float) -> None:
    def moved(**settings: float) -> torch.Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(5, 7)
        before = layer.weight.detach().clone()
        optimizer = lars(layer, 1.0, **settings)
        for _ in range(2):
            layer.weight.grad, layer.bias.grad = torch.ones(7, 5), torch.ones(7)
            optimizer.step()
        return layer.weight.detach() - before

    assert not torch.allclose(moved(), moved(momentum=momentum, trust_coefficient=trust))


class TestAudit:
    """A recipe in which a setting does nothing is refused, and the setting is named."""

    def refused(self, network: nn.Module, optimizer: torch.optim.Optimizer, expected: ExpectedGroups) -> str:
        schedule = WarmupCosine(optimizer, 10, 5, 1)
        with pytest.raises(UserError) as error:
            recipe_audit.check(network, optimizer, schedule, expected)
        return str(error.value)

    def optimizer(self, network: nn.Module, layer_decay: float = 0.75, weight_decay: float = 0.05) -> Any:
        return adamw_by_layer(network, 1.0, weight_decay, (0.9, 0.999), layer_decay)

    def test_a_sound_recipe_passes(self) -> None:
        network = vit(drop_path=0.1)
        optimizer = self.optimizer(network)
        recipe_audit.check(network, optimizer, WarmupCosine(optimizer, 10, 5, 1), ExpectedGroups(0.05, 0.75, 0.1))

    def test_layer_decay_that_no_group_carries(self) -> None:
        network = vit()
        plain = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
        assert "--model.weight_decay 0.05" in self.refused(network, plain, ExpectedGroups(0.05, 0.75))
        assert "--model.layer_decay 0.75" in self.refused(
            network, self.optimizer(network, layer_decay=1.0), ExpectedGroups(0.05, 0.75)
        )

    def test_layer_decay_that_the_schedule_does_not_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            WarmupCosine, "rates_at", lambda self, step: [self.lr_at(step, float(peak)) for peak in self.base_lrs]
        )
        network = vit()
        assert "is not in its learning rate" in self.refused(
            network, self.optimizer(network), ExpectedGroups(0.05, 0.75)
        )

    def test_drop_path_that_no_block_has(self) -> None:
        network = vit()
        assert "--model.drop_path 0.1" in self.refused(
            network, self.optimizer(network), ExpectedGroups(0.05, 0.75, 0.1)
        )

    def test_groups_that_leave_a_parameter_out_or_hold_a_frozen_one(self) -> None:
        network = vit()
        optimizer = self.optimizer(network)
        network.norm.weight.requires_grad_(False)
        assert "norm.weight is in a group of the optimiser, but is frozen" in self.refused(
            network, optimizer, ExpectedGroups(0.05, 0.75)
        )
        partial = self.optimizer(network)
        network.norm.weight.requires_grad_(True)
        assert "norm.weight is to be trained" in self.refused(network, partial, ExpectedGroups(0.05, 0.75))

    def test_lars_without_its_trust_ratio(self) -> None:
        layer = nn.Linear(4, 3)
        optimizer = lars(layer, 1.0)
        optimizer.param_groups[0]["always_adapt"] = False
        assert "trust ratio" in self.refused(layer, optimizer, ExpectedGroups(trust_ratio=True))

    def test_gradients_where_none_should_be_and_none_where_one_should(self) -> None:
        layer = nn.Linear(2, 2)
        layer.weight.grad = torch.ones(2, 2)
        with pytest.raises(UserError, match="bias is to be trained, but the loss does not depend on it"):
            recipe_audit.check_gradients(layer)
        layer.bias.requires_grad_(False)
        layer.weight.requires_grad_(False)
        with pytest.raises(UserError, match="weight is frozen, but has a gradient"):
            recipe_audit.check_gradients(layer)

    def test_names_are_shortened_without_losing_blocks(self) -> None:
        names = [f"blocks.{i}.attn.qkv.weight" for i in range(12)] + ["head.weight"]
        assert recipe_audit.shorten(names) == "blocks.0-11.attn.qkv.weight, head.weight"
        assert recipe_audit.shorten(names * 3, width=20).endswith("and 1 more")
