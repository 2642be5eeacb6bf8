"""What the weights in a file are: whose format, an encoder, an autoencoder or a classifier, of which architecture.

Everything is detected from the content: names of tensors give the format, their shapes the architecture. What neither
gives is recorded in a configuration beside the file, follows from published models, or has to be stated by the caller.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from jsonargparse import Namespace
from torch import Tensor

from mae.data.sampling import MaskSampling
from mae.errors import UserError
from mae.models.mae import NOT_COUNTS, MaskedAutoencoder
from mae.models.meta_device import meta_parameters
from mae.models.vit import build
from mae.weights.claims import FAULTS, MOST, check_arguments, is_number, is_size, shown
from mae.weights.detect_architecture import NO_OVERRIDES, ArchitectureDetector, ArchOverrides
from mae.weights.read_file import Opened, open_weights
from mae.weights.state_dict_keys import DECODER, ENCODER, State, dialect_of, to_ours
from mae.weights.weights import Format, Weights, fold_batchnorm, merge_lora
from mae.weights.wrappers import Unwrapped, unwrap

UNUSED_TENSORS = (f"{ENCODER}head_drop", "vit.pooler.", "pooler.", "vit.embeddings.mask_token")  # how names begin

MOST_NAMED = 3  # tensors in an error

ENCODER_SIZES = ("image_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")


class NotFinite(UserError):
    """Weights, or what a run knows besides them, that hold NaN or infinity."""


def overrides_from(config: Namespace) -> ArchOverrides:
    """The values of these options."""
    grid = None if config.grid is None else (config.grid[0], config.grid[1])
    return ArchOverrides(
        config.num_heads, config.decoder_num_heads, config.norm_pix_loss, grid, config.pool, config.prefix
    )


def usable_weights(src: str | Path, overrides: ArchOverrides = NO_OVERRIDES) -> Weights:
    """The weights that SRC holds.

    Args:
        src: A run folder, .ckpt or .safetensors file of this project; an official .pth, a checkpoint of the official
            scripts; a state dict of timm; a folder that transformers has saved. Prefixes of wrappers do not matter.
        overrides: What the file does not record; values that it does record may only be repeated.

    Raises:
        UserError: It cannot be read, is none of these, something must be stated, or the weights cannot be used.
    """
    return require_usable(detect_opened(open_weights(src), overrides))


def require_usable(weights: Weights) -> Weights:
    """
    Raises:
        UserError: Something is missing, unknown or of another shape, or there are numbers that are not finite.
    """
    not_finite = [f"{key} has numbers that are not finite" for key, v in weights.state.items() if count_non_finite(v)]
    if problems := [*weights.problems, *not_finite]:
        message = f"{weights.source} cannot be used: {'; '.join(problems[:MOST_NAMED])}; `mae inspect` tells more"
        raise UserError(message) if weights.problems else NotFinite(message)
    return weights


def detect_opened(opened: Opened, overrides: ArchOverrides) -> Weights:
    """The weights in an opened file; their `problems` say why they cannot be used, if so."""
    state, description = opened.state, opened.description
    if description is not None and overrides.prefix is not None:
        raise UserError(f"--prefix {overrides.prefix}: {opened.path} is a file of this project, which has one encoder")
    try:
        if description is not None:
            check_own_description(opened.path, description, len(state))
        if description is not None and opened.about.get("key") == "state_dict":
            weights = Weights(opened.path, as_float32(run_state(state, description)), description)
        else:
            weights = detect_by_names(opened, overrides)
        weights = weights._replace(problems=problems_of(weights))
        reject_contradictions(weights, overrides)
    except UserError:
        raise
    except FAULTS as error:  # tensors whose shapes do not go together, before they can be compared with what is wanted
        reason = " ".join(str(error).split())
        raise UserError(f"{opened.path} cannot be used: {reason[:200] or type(error).__name__}") from None
    return weights


def detect_by_names(opened: Opened, overrides: ArchOverrides) -> Weights:
    """The weights of any file but a run's own checkpoints."""
    path, state, description = opened.path, opened.state, opened.description
    unwrapped = unwrap(path, state, overrides.prefix) if description is None else None
    if unwrapped is None:
        if all(key.startswith("model.") for key in state):
            state = {key.removeprefix("model."): value for key, value in state.items()}
        if (dialect := dialect_of(state)) is None:
            raise UserError(
                f"{path} holds no ViT that is known here: its tensors are {', '.join(list(state)[:MOST_NAMED])}, ...; "
                "the names of this project, of the official code, of timm, of transformers' ViTMAE, of torchvision and "
                "of mmpretrain are known"
            )
        unwrapped = Unwrapped(to_ours(state, dialect), dialect, [], "", {})
    dialect = unwrapped.dialect
    for key, value in unwrapped.state.items():
        if not value.is_floating_point() and not key.endswith("batches_tracked"):
            raise UserError(f"{path}: {key} is {value.dtype}, but weights must be floating-point numbers")
    state = as_float32(unwrapped.state)
    unused = [key for key in state if key.startswith(UNUSED_TENSORS)]
    state = {key: value for key, value in state.items() if key not in unused}
    notes = [*opened.notes, *unwrapped.notes, *([f"not used: {', '.join(unused[:MOST_NAMED])}"] if unused else [])]
    dtypes = sorted({str(v.dtype).removeprefix("torch.") for v in unwrapped.state.values() if v.is_floating_point()})
    if dtypes not in ([], ["float32"]):
        notes.append(f"stored as {' and '.join(dtypes)}, used as float32")
    file_format = format_of(opened, unwrapped)
    if description is not None:
        return Weights(path, state, description, file_format, tuple(notes))
    opened = opened._replace(about=opened.about | {"recorded": unwrapped.recorded})
    if f"{ENCODER}fc_norm.weight" in state and f"{ENCODER}head.1.weight" in state:
        state = fold_batchnorm(state)
        notes.append("a probe of the mean of tokens: its BatchNorm is folded into the linear layer")
    weights = described(opened, state, overrides, file_format, notes)
    if unwrapped.decoder and (problems := problems_of(weights)):
        # Nothing says that a decoder in a module of its own is built like this one.
        encoder = {key: value for key, value in state.items() if key.startswith(ENCODER)}
        notes.append(f"its decoder ({unwrapped.decoder}) is left out, since it is another one than here: {problems[0]}")
        weights = described(opened, encoder, overrides, file_format, notes)
    return weights


def described(
    opened: Opened, state: State, overrides: ArchOverrides, file_format: Format, notes: Sequence[str]
) -> Weights:
    """The weights with the description that is detected from tensors under our names."""
    try:
        detector = ArchitectureDetector(opened, state, overrides)
        description = detector.description()
    except UserError:
        raise
    except FAULTS as error:
        reason = " ".join(f"{'' if type(error) is ValueError else type(error).__name__ + ': '}{error}".split())[:200]
        where = opened.about.get("config_path")
        where = f" and in {where}" if where else ""
        raise UserError(
            f"{opened.path}: the settings that are stored with it{where} cannot be used ({reason})"
        ) from None
    notes = (*notes, *detector.notes)
    return Weights(opened.path, detector.state, description, file_format, notes, (), detector.target_assumed_from)


def reject_contradictions(weights: Weights, overrides: ArchOverrides) -> None:
    """Raise a UserError where the caller states something other than the file records."""
    pool = weights.classifier["pool"] if weights.classifier else None
    for key, value in overrides._asdict().items():
        recorded = {"grid": weights.grid, "pool": pool}.get(key, weights.config.get(key))
        if value is not None and recorded is not None and value != recorded:  # None: of a decoder that is not there
            raise UserError(f"{key} {value}: {weights.source} has {recorded}")


def as_float32(state: State) -> State:
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def format_of(opened: Opened, unwrapped: Unwrapped) -> Format:
    """timm's names are the official ones of an encoder: the dictionary around them makes the difference."""
    if "architecture" in opened.about.get("config", {}):
        return "timm"
    if unwrapped.dialect == "official" and opened.about.get("key") != "model":
        official_decoder = not unwrapped.decoder and any(key.startswith(DECODER) for key in unwrapped.state)
        return "mae" if opened.description else "official" if official_decoder else "timm"
    return unwrapped.dialect


def run_state(state: State, description: dict[str, Any]) -> State:
    """The weights in a run's .ckpt: of a classifier the averaged ones where there are any, with adapters merged."""
    state = {key.removeprefix("model."): value for key, value in state.items()}
    averaged = {key.removeprefix("ema.module."): value for key, value in state.items() if key.startswith("ema.module.")}
    if "classifier" not in description:
        return averaged or state
    merged = merge_lora(averaged or state, description["classifier"]["lora_scale"])
    return {ENCODER + key: value for key, value in merged.items()}


# ---- completeness ----------------------------------------------------------------------------------------------------


def problems_of(weights: Weights) -> tuple[str, ...]:
    """The tensors that are missing, unknown or of another shape than the description has it.

    Raises:
        UserError: The description itself makes no sense.
    """
    check_own_description(weights.source, weights.description, len(weights.state))
    try:
        expected = expected_shapes(weights)
    except FAULTS as error:
        raise UserError(f"{weights.source} does not fit its own description: {error}") from None
    state, problems = weights.state, list(weights.problems)
    if missing := [key for key in expected if key not in state]:
        problems.append(f"it lacks {first_names(missing)}")
    if unknown := [key for key in state if key not in expected]:
        problems.append(f"it holds unknown tensors: {first_names(unknown)}")
    wrong = [key for key in expected if key in state and tuple(state[key].shape) != expected[key]]
    problems += [f"{key} is {tuple(state[key].shape)}, wanted {expected[key]}" for key in wrong[:MOST_NAMED]]
    return tuple(problems)


def first_names(names: Sequence[str]) -> str:
    """The first few names, and how many there are besides."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def expected_shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that weights of this description have."""
    about = weights.classifier
    with meta_parameters():
        if about is not None:
            network = build(weights.config, len(about["classes"]), about["pool"], about["head"])
            return {ENCODER + key: tuple(value.shape) for key, value in network.state_dict().items()}
        state = MaskedAutoencoder(**weights.config).state_dict()
    has_decoder = any(key.startswith(DECODER) for key in weights.state)
    return {key: tuple(value.shape) for key, value in state.items() if has_decoder or key.startswith(ENCODER)}


def check_own_description(path: Path, description: dict[str, Any], tensors: int) -> None:
    """
    Raises:
        UserError: As in `check_description`; it names the file.
    """
    try:
        check_description(description, tensors)
    except FAULTS as error:
        raise UserError(f"{path} does not fit its own description: {error}") from None


def check_description(description: dict[str, Any], tensors: int) -> None:
    """Check what a description says before anything is built by it, and what no tensor shows.

    Args:
        tensors: How many there are: every block has some.

    Raises:
        ValueError: Nothing can be computed with it.
    """
    model = description.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"model is {shown(model)}")
    if missing := [key for key in ENCODER_SIZES if key not in model]:
        raise ValueError(f"{missing[0]} is missing")
    for key, value in model.items():
        if key not in NOT_COUNTS and not is_size(value, pair=key in ("image_size", "patch_size")):
            raise ValueError(f"{key} is {shown(value)}")
        if key in ("depth", "decoder_depth") and value > tensors:
            raise ValueError(f"{key} is {value:,}, with {tensors:,} tensors in all")
    if not is_number(ratio := model["mlp_ratio"]) or not 0 < ratio * model["embed_dim"] <= MOST**2:
        raise ValueError(f"mlp_ratio is {shown(ratio)}")
    if not isinstance(model.get("timm_encoder", ""), str):
        raise ValueError(f"timm_encoder is {shown(model['timm_encoder'])}")
    check_arguments(model.get("timm_args"), tensors)
    for key in ("mean", "std"):
        values = description.get(key, [0.5] * model["in_chans"])
        known = isinstance(values, list | tuple) and len(values) == model["in_chans"] and all(map(is_number, values))
        if values is not None and not known:
            raise ValueError(f"{key} is {shown(values)}, its images have {model['in_chans']} channels")
        if key == "std" and values is not None and min(values) <= 0:
            raise ValueError(f"std is {shown(values)}, by which nothing can be divided")
    if not is_number(ratio := description.get("mask_ratio", 0.75)) or not 0 < ratio < 1:
        raise ValueError(f"mask_ratio is {shown(ratio)}")
    if (sampling := description.get("mask_sampling", "random")) not in get_args(MaskSampling):
        raise ValueError(f"mask_sampling is {shown(sampling)}")
    if not isinstance(target := model.get("norm_pix_loss", True), bool):
        raise ValueError(f"norm_pix_loss is {shown(target)}")
    about = description.get("classifier")
    for holder in (description, about or {}):
        if (crop := holder.get("crop_pct")) is not None and (not is_number(crop) or not 0 < crop <= 1):
            raise ValueError(f"crop_pct is {shown(crop)}")
    if about is not None:
        check_classifier(about)


def check_classifier(about: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: No classifier can be built by it.
    """
    classes = about["classes"]
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes is {shown(classes)}")
    for key, known in (("pool", ("mean", "class")), ("head", ("linear", "batchnorm", "plain"))):
        if about[key] not in known:
            raise ValueError(f"{key} is {shown(about[key])}")
    if not is_number(scale := about["lora_scale"]):
        raise ValueError(f"lora_scale is {shown(scale)}")


def count_non_finite(tensor: Tensor) -> int:
    """How many of its numbers are NaN or infinite."""
    return int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
