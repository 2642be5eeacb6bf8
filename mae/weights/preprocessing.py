"""What a file of transformers or timm says of how images become a model's input, as far as it is followed here.

Evaluation here resizes the short side to size / crop_pct (bicubic), cuts the size out of the centre, and normalises.
"""

import re
from typing import Any, NamedTuple

from mae.models.mae import Pair

HERE = "here the short side is resized and the centre cropped"

FILTERS = {0: "by nearest neighbours", 1: "with Lanczos' filter", 2: "bilinearly", 3: "bicubically"}  # Pillow's numbers

FILTERS |= {4: "with a box filter", 5: "with Hamming's filter"}

TIMM_FILTERS = {"nearest": FILTERS[0], "lanczos": FILTERS[1], "bilinear": FILTERS[2], "bicubic": FILTERS[3]}

TIMM_CROPS = {"squash": "squashes images to {} without regard to their shape", "border": "adds borders to make {}"}

# transformers' processors for which one number is the short side; for the others it is a square's.
SHORT_SIDE = re.compile(r"CLIP|ChineseCLIP|ConvNext|Bit|MobileNet|VideoMAE")

WARPED_FROM = 384  # from this size on, transformers' ConvNext processor squashes images


class Preprocessing(NamedTuple):
    settings: dict[str, Any]  # mean, std, crop_pct, as far as they are told
    notes: list[str]  # what is told and not followed


def by_transformers(processor: dict[str, Any], image_size: Pair, in_chans: int) -> Preprocessing:
    """What a `preprocessor_config.json` tells, in any form that transformers has written."""
    if not processor:
        return Preprocessing({}, [])
    processor = {key: value for key, value in processor.items() if value is not None}
    settings, notes = normalisation(processor, in_chans)
    short, whole = sides(processor)
    crop = pair_of(processor["crop_size"]) if processor.get("do_center_crop") else None
    made = crop or whole
    crop_pct = 1.0
    if not processor.get("do_resize", True):
        how = f"cuts {by(crop)} out of the centre" if crop else "takes them as they are"
        notes.append(f"does not resize images, but {how}; {HERE}")
    elif short and "crop_pct" in processor:
        made = (short, short)
        if short < WARPED_FROM:
            crop_pct = float(processor["crop_pct"])
        else:
            notes.append(f"squashes images to {by(made)} without regard to their shape; {HERE}")
    elif short:
        made = crop or (short, short)
        if crop is None:
            notes.append(f"resizes the short side to {short} and cuts nothing off the long one; {HERE}")
        else:
            crop_pct = min(crop) / short
    elif whole:
        notes.append(f"squashes images to {by(whole)} without regard to their shape; {HERE}")
        crop_pct = min(c / w for c, w in zip(crop, whole, strict=True)) if crop else 1.0
    elif "size" in processor:
        notes.append(f"has a size of a form that is not known, {processor['size']}; {HERE}")
    if crop_pct > 1 and crop:
        notes.append(f"adds borders to make {by(crop)}; {HERE}")
    if processor.get("do_pad"):
        notes.append("adds borders to images; here there are none")
    if made and made != image_size:
        notes.append(f"makes images of {by(made)}, where this model takes {by(image_size)}")
    resample = processor.get("resample", 3)
    if processor.get("do_resize", True) and resample != 3:
        notes.append(f"resizes {FILTERS.get(resample, f'with filter {resample}')}; here bicubically")
    if {"size", "do_resize", "do_center_crop"} & processor.keys():
        settings["crop_pct"] = min(crop_pct, 1.0)
    return Preprocessing(settings, [f"preprocessor_config.json: it {note}" for note in notes])


def normalisation(processor: dict[str, Any], in_chans: int) -> tuple[dict[str, Any], list[str]]:
    """Mean and std of channels in [0, 1]: scaling and offset of pixels are made part of them."""
    settings, notes = {}, []
    factor = float(processor.get("rescale_factor", 1 / 255)) if processor.get("do_rescale", True) else 1.0
    scale = 1.0 if abs(255 * factor - 1) < 1e-6 else 255 * factor
    offset = 1.0 if processor.get("rescale_offset") or processor.get("offset") else 0.0
    normalises = processor.get("do_normalize", True)
    for key, neutral in (("mean", 0.0), ("std", 1.0)):
        values = processor.get(f"image_{key}") if normalises else neutral
        if values is None:
            continue
        values = [values] * in_chans if isinstance(values, int | float) else list(values)
        settings[key] = [(value + (offset if key == "mean" else 0.0)) / scale for value in values]
    if not processor.get("do_rescale", True):
        notes.append("does not rescale pixels: mean and std are for values from 0 to 255, and are used so")
    return settings, notes


def sides(processor: dict[str, Any]) -> tuple[int | None, Pair | None]:
    """To what images are resized: their short side, or height and width; (None, None) where it is not known."""
    size = processor.get("size")
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type"))
    if isinstance(size, dict) and not {"height", "width"} <= size.keys():
        short = size.get("shortest_edge")
        return (int(short), None) if short and not size.get("longest_edge") else (None, None)
    if isinstance(size, int) and SHORT_SIDE.match(kind):
        return size, None
    return None, None if size is None else pair_of(size)


def pair_of(size: Any) -> Pair:
    """Height and width, of any form that transformers has had for them."""
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size["shortest_edge"]
    height, width = (size, size) if isinstance(size, int | float) else size
    return int(height), int(width)


def by_timm(cfg: dict[str, Any], image_size: Pair) -> Preprocessing:
    """What the `pretrained_cfg` of a timm model tells."""
    settings = {key: cfg[key] for key in ("mean", "std", "crop_pct") if cfg.get(key) is not None}
    notes = []
    if (crop := cfg.get("crop_mode") or "center") != "center":
        notes.append(f"{TIMM_CROPS.get(crop, f'crops in the mode {crop}').format(by(image_size))}; {HERE}")
    if (name := cfg.get("interpolation") or "bicubic") != "bicubic":
        notes.append(f"resizes {TIMM_FILTERS.get(name, f'in the mode {name}')}; here bicubically")
    if (made := cfg.get("input_size")) and pair_of(made[1:]) != image_size:
        notes.append(f"makes images of {by(pair_of(made[1:]))}, where this model takes {by(image_size)}")
    return Preprocessing(settings, [f"config.json: it {note}" for note in notes])


def by(size: Pair) -> str:
    return f"{size[0]}x{size[1]}"
