"""The network: the official numbers, and what must hold for any of its sizes."""

from collections.abc import Callable

import pytest
import timm
import torch
from conftest import reference
from torch import Tensor, nn

from mae import MaskedAutoencoder
from mae.models.mae import SIZES, patchify, random_masking, sincos_positions, take, unpatchify
from mae.models.meta_device import meta_parameters
from mae.models.vit import build
from mae.weights.load import load_official_state_dict
from mae.weights.state_dict_keys import official_name

SIZE = {
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 4,
}


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def small(**changes: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(**{"image_size": 32, "patch_size": 4, **SIZE, **changes})  # type: ignore[arg-type]


def test_meta_parameters_have_shapes_and_no_memory() -> None:
    real = small()
    with meta_parameters():
        networks = small(), build(real.config, 5, "mean", "batchnorm", drop_path=0.1)
    for network in networks:
        assert all(tensor.is_meta for tensor in network.state_dict().values())
    shapes = {key: value.shape for key, value in networks[0].state_dict().items()}
    assert shapes == {key: value.shape for key, value in real.state_dict().items()}


@pytest.fixture(params=["pixel", "norm_pix"])
def official(request: pytest.FixtureRequest):
    tensors, facts = reference("mae_tiny")
    tag = request.param
    model = small(norm_pix_loss=tag == "norm_pix")
    load_official_state_dict(model, {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    return tag, model, tensors, facts


def test_loss_mask_and_predictions_are_the_official_ones(official) -> None:
    tag, model, tensors, facts = official
    out = model(tensors["imgs"], tensors["noise"])
    assert out.loss.item() == pytest.approx(facts[f"loss_{tag}"], rel=1e-5)
    assert out.mask.dtype == torch.bool
    assert torch.equal(out.mask, tensors["mask"].bool())
    prediction = model.predict(tensors["imgs"], tensors["noise"])
    assert torch.equal(prediction.mask, out.mask)
    assert relative(prediction.pred, tensors[f"{tag}.pred"]) < 1e-5
    assert relative(model.encode(tensors["imgs"]), tensors["latent_full"]) < 1e-5


def test_gradients_are_the_official_ones(official) -> None:
    tag, model, tensors, _ = official
    model(tensors["imgs"], tensors["noise"]).loss.backward()
    wanted = {k.removeprefix(f"{tag}.grad."): v for k, v in tensors.items() if k.startswith(f"{tag}.grad.")}
    given = {official_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert given.keys() == wanted.keys()
    whole = torch.stack([grad.norm() for grad in wanted.values()]).norm()
    for name, grad in wanted.items():
        error = (given[name] - grad).norm()
        # Some are zero in theory, such as the key bias': those are held against the whole gradient.
        assert error <= 1e-5 * (grad.norm() if grad.norm() > 1e-5 * whole else whole), name


def test_official_weights_that_do_not_fit_are_named() -> None:
    tensors, _ = reference("mae_tiny")
    state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    broken = {**state, "surplus": torch.zeros(1), "cls_token": torch.zeros(1, 1, 5)}
    del broken["mask_token"]
    with pytest.raises(ValueError, match=r"missing mask_token.*extra surplus.*cls_token is \(1, 1, 5\)"):
        load_official_state_dict(small(), broken)


def test_positions_are_the_official_ones() -> None:
    tensors, _ = reference("sincos")
    assert (sincos_positions(192, (8, 8))[0] - tensors["sincos_192_8"]).abs().max() < 1e-6


def test_positions_of_a_wide_grid_tell_row_from_column() -> None:
    table = sincos_positions(16, (2, 5))[0, 1:].view(2, 5, 16)
    assert torch.equal(table[0, :, :8], table[1, :, :8])  # the first half encodes the column
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])  # the second half the row
    assert len(table.flatten(0, 1).unique(dim=0)) == 10


@pytest.mark.parametrize("in_chans", [1, 3, 4, 13])
@pytest.mark.parametrize(("image", "patch"), [((8, 8), (4, 4)), ((12, 20), (4, 5)), ((6, 16), (6, 2))])
def test_patchify_round_trip(in_chans: int, image: tuple[int, int], patch: tuple[int, int]) -> None:
    images = torch.randn(2, in_chans, *image)
    patches = patchify(images, patch)
    (h, w), (ph, pw) = image, patch
    assert patches.shape == (2, h // ph * (w // pw), ph * pw * in_chans)
    assert torch.equal(unpatchify(patches, image, patch), images)
    assert torch.equal(patches[0, 1, :in_chans], images[0, :, 0, pw])  # raster order; channel last


@pytest.mark.parametrize("in_chans", [1, 4, 13])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_any_shape_trains_and_encodes_as_timm_does(in_chans: int, norm_pix_loss: bool) -> None:
    model = small(image_size=(12, 40), patch_size=(4, 5), in_chans=in_chans, norm_pix_loss=norm_pix_loss).eval()
    images = torch.randn(3, in_chans, 12, 40)
    out = model(images, torch.rand(3, 24))
    assert out.mask.sum(dim=1).tolist() == [18, 18, 18]
    assert out.loss.isfinite()
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=(12, 40), patch_size=(4, 5), in_chans=in_chans, num_classes=0,
        embed_dim=48, depth=2, num_heads=3,
    ).eval()  # fmt: skip
    plain.load_state_dict(model.encoder.state_dict())  # strict
    assert (model.encode(images) - plain.forward_features(images)).abs().max() < 1e-5


def test_encoding_the_visible_patches_equals_timm_where_all_are_visible() -> None:
    model = small().eval()
    images = torch.randn(2, 3, 32, 32)
    everything = torch.arange(64).expand(2, -1)
    visible = model.encode_visible(patchify(images, (4, 4)), everything)
    assert (visible - model.encode(images)).abs().max() < 1e-5


def test_hidden_pixels_cannot_reach_the_encoder() -> None:
    model = small().eval()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
    masking = random_masking(noise, 0.75)
    patches = patchify(images, (4, 4))
    changed = torch.where(masking.mask[:, :, None], torch.full_like(patches, 1e6), patches)
    assert torch.equal(take(patches, masking.ids_keep), take(changed, masking.ids_keep))
    assert torch.equal(
        model.predict(images, noise).pred, model.predict(unpatchify(changed, (32, 32), (4, 4)), noise).pred
    )


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_visible_patches_are_no_target(norm_pix_loss: bool) -> None:
    # The loss reads them through the encoder alone: with the encoder cut off, changing them changes nothing.
    model = small(norm_pix_loss=norm_pix_loss).eval()
    with torch.no_grad():
        model.encoder.patch_embed.proj.weight.zero_()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
    patches = patchify(images, (4, 4))
    changed = torch.where(
        random_masking(noise, 0.75).mask[:, :, None], patches, patches + 3 * torch.randn_like(patches)
    )
    changed_images = unpatchify(changed, (32, 32), (4, 4))
    assert torch.equal(model(images, noise).loss, model(changed_images, noise).loss)
    everywhere = images + 3 * torch.randn_like(images)
    assert not torch.equal(model(images, noise).loss, model(everywhere, noise).loss)


def test_masking_keeps_the_lowest_scores_and_breaks_ties_by_place() -> None:
    noise = torch.tensor([[0.3, 0.1, 0.9, 0.1], [0.5, 0.5, 0.5, 0.5]])
    masking = random_masking(noise, 0.5)
    assert masking.mask.tolist() == [[True, False, True, False], [False, False, True, True]]
    assert masking.ids_keep.tolist() == [[1, 3], [0, 1]]
    both = torch.cat([masking.ids_keep, masking.ids_hide], dim=1)
    assert torch.equal(both.gather(1, masking.ids_restore), torch.arange(4).expand(2, -1))


@pytest.mark.parametrize("ratio", [0.0, 0.99, 1.0, -0.5, 1.5])
def test_a_ratio_that_hides_or_shows_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="of 64 patches visible"):
        small()(torch.randn(1, 3, 32, 32), torch.rand(1, 64), mask_ratio=ratio)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="33x32 is not divisible by patch_size 4x4"):
        small(image_size=(33, 32))
    with pytest.raises(ValueError, match="decoder_embed_dim 30"):
        small(decoder_embed_dim=30)
    with pytest.raises(ValueError, match="this model takes"):
        small()(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match="noise is"):
        small()(torch.randn(2, 3, 32, 32), torch.rand(2, 63))


def test_initialisation_is_the_official_one() -> None:
    model = MaskedAutoencoder(64, 8, embed_dim=256, depth=2, num_heads=4, decoder_embed_dim=128, decoder_depth=1)
    for name, p in model.named_parameters():
        if name.endswith("pos_embed"):
            assert not p.requires_grad
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p) if name.endswith("weight") else torch.zeros_like(p)), name
        elif name.endswith("_token"):
            assert p.std().item() == pytest.approx(0.02, rel=0.3), name
        elif name.endswith("weight"):
            fan = p.shape[0] + p[0].numel()  # the patch embedding counts as a linear layer
            bound = (6 / fan) ** 0.5
            assert p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
        elif name != "encoder.patch_embed.proj.bias":
            assert not p.any(), name


@pytest.mark.parametrize(
    ("size", "patch", "millions", "encoder_millions"),
    [("base", 16, 111.91, 85.80), ("large", 16, 329.54, 303.30), ("huge", 14, 657.07, 630.76)],
)
def test_published_numbers_of_parameters(
    size: str, patch: int, millions: float, encoder_millions: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Older versions of timm read drop-path rates off a tensor, which the meta device cannot give.
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **settings: linspace(*args, **{**settings, "device": "cpu"}))
    with torch.device("meta"):
        model = MaskedAutoencoder(224, patch, **SIZES[size]._asdict())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert round(sum(p.numel() for p in model.encoder.parameters()) / 1e6, 2) == encoder_millions


def test_noise_none_draws_from_the_global_generator() -> None:
    model, images = small(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(3)
    drawn = model(images).mask
    torch.manual_seed(3)
    assert torch.equal(drawn, model(images, torch.rand(2, 64)).mask)


def both_ways(build: Callable[[bool], nn.Module]) -> list[nn.Module]:
    """The same network in training, without and with activation checkpointing."""
    plain, checkpointed = build(False).train(), build(True).train()
    checkpointed.load_state_dict(plain.state_dict())  # strict: the names are the same
    return [plain, checkpointed]


def kept_bytes(loss: Callable[[], Tensor]) -> int:
    """What the forward pass keeps for the backward pass."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    return sum(kept.values())


def test_activation_checkpointing_gives_the_same_bits_from_less_memory() -> None:
    networks = both_ways(lambda on: small(depth=6, decoder_depth=4, activation_checkpointing=on))
    images, noise = torch.randn(8, 3, 32, 32), torch.rand(8, 64)
    for network in networks:
        network(images, noise).loss.backward()
    plain, checkpointed = (dict(network.named_parameters()) for network in networks)
    assert networks[0](images, noise).loss == networks[1](images, noise).loss
    for name, p in plain.items():
        assert (p.grad is None) == (checkpointed[name].grad is None)
        assert p.grad is None or torch.equal(p.grad, checkpointed[name].grad), name
    kept = [kept_bytes(lambda network=network: network(images, noise).loss) for network in networks]
    assert kept[1] < kept[0] / 3
    # Where nothing is trained there is nothing to save.
    calls = []
    for network in networks:
        network.encoder.blocks[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
        network.eval()(images, noise).loss.backward()
    assert len(calls) == 2


def test_a_block_is_computed_twice_and_drops_the_same_branches_again() -> None:
    config = {"image_size": 32, "patch_size": 4, "in_chans": 3, "embed_dim": 48, "depth": 4, "num_heads": 3}
    networks = both_ways(
        lambda on: build(config | {"mlp_ratio": 4.0}, 5, "mean", "linear", 0.5, activation_checkpointing=on)
    )
    images, losses, after, calls = torch.randn(8, 3, 32, 32), [], [], [0, 0]

    def count(i: int) -> None:
        calls[i] += 1

    for i, network in enumerate(networks):
        with torch.no_grad():
            network.head.weight.normal_(generator=torch.Generator().manual_seed(0))
        network.blocks[2].mlp.fc1.register_forward_hook(lambda *_, i=i: count(i))
        torch.manual_seed(7)
        losses.append(network(images).square().mean())
        losses[-1].backward()
        after.append(torch.rand(1))
    assert calls == [1, 2]
    assert losses[0] == losses[1]
    assert after[0] == after[1]  # nor are later draws moved
    for (name, p), q in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_visible_patches_weigh_in_the_loss() -> None:
    model = small()
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 64)
    errors = (model.predict(images, noise).pred - model.target(patchify(images, (4, 4)))).square().mean(dim=2)  # (B, N)
    mask = model.predict(images, noise).mask
    hidden, visible = (errors * mask).sum(dim=1), (errors * ~mask).sum(dim=1)
    assert torch.equal(small(visible_loss_weight=0.0)(images, noise).per_image, model(images, noise).per_image)
    for weight in (0.25, 1.0):
        weighted = small(visible_loss_weight=weight)
        assert weighted.config == model.config | {"visible_loss_weight": weight}
        expected = (hidden + weight * visible) / (48 + weight * 16)
        torch.testing.assert_close(weighted(images, noise).per_image, expected, rtol=1e-5, atol=0)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"visible_loss_weight .* must be at least 0 and at most 1"):
            small(visible_loss_weight=wrong)


def test_mask_tokens_in_the_encoder() -> None:
    """As written out in raster order: mask tokens replace hidden patches before the encoder, and nothing after it."""
    model = small(encoder_mask_tokens=True)
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 64)
    prediction = model.predict(images, noise)
    embedded = model.encoder.patch_embed(images)  # (B, N, D)
    x = torch.where(prediction.mask[..., None], model.mask_token, embedded) + model.pos_embed[:, 1:]
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(3, -1, -1), x], dim=1)
    x = model.decoder_embed(model.encoder.norm(model.encoder.blocks(x))) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    pred = model.decoder_pred(model.decoder_norm(x[:, 1:]))
    torch.testing.assert_close(prediction.pred, pred, rtol=1e-4, atol=1e-5)
    out = model(images, noise)
    errors = (pred - model.target(patchify(images, (4, 4)))).square().mean(dim=2)
    torch.testing.assert_close(out.per_image, (errors * out.mask).sum(dim=1) / 48, rtol=1e-4, atol=0)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    again = MaskedAutoencoder(**model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images, noise).loss, out.loss)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_principal_components_of_patches(norm_pix_loss: bool) -> None:
    images = torch.randn(40, 3, 32, 32).cumsum(2).cumsum(3)
    images = images / images.std()
    pixels = small(norm_pix_loss=norm_pix_loss).target(patchify(images, (4, 4)))
    flat = pixels.flatten(0, 1).double()
    for components in (48, 12):
        model = small(norm_pix_loss=norm_pix_loss, pca_target=components)
        assert model.config["pca_target"] == components
        model.fit_target(images.split(16))
        found = model.target(patchify(images, (4, 4)))
        assert found.shape == (40, 64, components)
        left = (model.target_pixels(found) - pixels).square().sum() / (pixels - flat.mean(0)).square().sum()
        values = torch.linalg.svdvals(flat - flat.mean(0)).square()  # in descending order
        assert left.item() == pytest.approx((values[components:].sum() / values.sum()).item(), abs=1e-5)
        assert found.flatten(0, 1).var(0).diff().max() <= 1e-4  # the first component varies most
        assert model.predict(images).pred.shape == found.shape
        again = small(norm_pix_loss=norm_pix_loss, pca_target=components)
        again.load_state_dict(model.state_dict())
        noise = torch.rand(40, 64)
        assert torch.equal(again(images, noise).loss, model(images, noise).loss)
    with pytest.raises(ValueError, match="pca_target 49 is more than the 48 values of a patch"):
        small(pca_target=49)
