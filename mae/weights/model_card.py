"""What lies beside exported weights: configurations for timm and transformers, and a model card for people."""

import json
import re
from pathlib import Path
from typing import Any

from mae.models.mae import SIZES, Size
from mae.weights.weights import Weights

UNKNOWN_LICENCE = "not recorded; whoever trained these weights has to say"


def size_name(config: dict[str, Any]) -> str | None:
    """The name of these sizes in SIZES, or None."""
    sizes = Size(config["embed_dim"], config["depth"], config["num_heads"])
    return next((name for name, size in SIZES.items() if size == sizes), None)


def count_of(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def architecture_name(weights: Weights) -> str:
    """For example `ViT-base/16, 224x224 pixels`."""
    config, name = weights.config, size_name(weights.config)
    (height, width), (ph, pw) = config["image_size"], config["patch_size"]
    patch = f"{ph}" if ph == pw else f"{ph}x{pw}"
    channels = "" if config["in_chans"] == 3 else f", {count_of(config['in_chans'], 'channel')}"
    sizes = f"ViT {config['embed_dim']} wide, {config['depth']} blocks, {config['num_heads']} heads, patch {patch}"
    if "timm_encoder" in config:
        name, sizes = "", f"timm's {config['timm_encoder']}, {sizes.removeprefix('ViT ')}"
    return (f"ViT-{name}/{patch}" if name else sizes) + f", {height}x{width} pixels{channels}"


def timm_config(weights: Weights) -> dict[str, Any]:
    """The `config.json` for timm: `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it."""
    config, about, arguments = weights.config, weights.classifier, timm_arguments(weights)
    return {
        "architecture": "vit_base_patch16_224",  # model_args change whatever is different
        "num_classes": arguments["num_classes"],
        "num_features": config["embed_dim"],
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            **weights.preprocessing,
            "tag": "mae",
            "custom_load": False,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **({"license": weights.description["licence"]} if "licence" in weights.description else {}),
            **({"label_names": about["classes"]} if about else {}),
        },
    }


def timm_arguments(weights: Weights) -> dict[str, Any]:
    """The arguments of timm's VisionTransformer."""
    config, about = weights.config, weights.classifier
    arguments = {key: config[key] for key in ("in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    arguments |= {"img_size": list(config["image_size"]), "patch_size": list(config["patch_size"])}
    mean = about is not None and about["pool"] == "mean"
    arguments |= {"num_classes": len(about["classes"]) if about else 0, "global_pool": "avg" if mean else "token"}
    return arguments | {"fc_norm": mean and about is not None and about["head"] == "linear"}


def hf_config(weights: Weights) -> dict[str, Any]:
    """The `config.json` for transformers."""
    config, about = weights.config, weights.classifier
    network, model_type = ("ViTForImageClassification" if about else "ViTModel"), "vit"
    settings: dict[str, Any] = {
        "hidden_size": config["embed_dim"],
        "num_hidden_layers": config["depth"],
        "num_attention_heads": config["num_heads"],
        "intermediate_size": int(config["embed_dim"] * config["mlp_ratio"]),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,  # transformers' own default is 1e-12
        "image_size": config["image_size"][0],
        "patch_size": config["patch_size"][0],
        "num_channels": config["in_chans"],
        "qkv_bias": True,
        "dtype": "float32",
    }
    if weights.has_decoder:
        network, model_type = "ViTMAEForPreTraining", "vit_mae"
        settings |= {
            "decoder_hidden_size": config["decoder_embed_dim"],
            "decoder_num_hidden_layers": config["decoder_depth"],
            "decoder_num_attention_heads": config["decoder_num_heads"],
            "decoder_intermediate_size": int(config["decoder_embed_dim"] * config["mlp_ratio"]),
            "mask_ratio": weights.description["mask_ratio"],
            "norm_pix_loss": config["norm_pix_loss"],
        }
    if about:
        settings["id2label"] = {str(i): name for i, name in enumerate(about["classes"])}
        settings["label2id"] = {name: i for i, name in enumerate(about["classes"])}
    return {"architectures": [network], "model_type": model_type, **settings}


def hf_processor(weights: Weights) -> dict[str, Any]:
    """The `preprocessor_config.json` for transformers: resize the short side, then centre crop."""
    size = weights.config["image_size"][0]
    return {
        # transformers' ViTImageProcessor has no centre crop; this one is that of DINOv2.
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": weights.config["in_chans"] == 3,
        "do_resize": True,
        "size": {"shortest_edge": int(size / weights.crop_pct)},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(weights.description["mean"]),
        "image_std": list(weights.description["std"]),
    }


USE = {
    "mae": '{load}("{name}")',
    "official": '{load}("{name}")  # the official scripts: --resume or --finetune {name}',
    "timm": "import timm\n\n{timm}\nfeatures = model.forward_features(images)  # (B, 1 + patches, width), unmasked",
    "hf": 'from transformers import {hf}\n\nmodel = {hf}.from_pretrained("{name}"{hf_more})',
    "onnx": 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{name}")  # takes numpy arrays\n'
    "outputs = session.run(None, {{{feed}}})",
    "export": 'import torch\n\nmodel = torch.export.load("{name}").module()',
}


def card_text(weights: Weights, format: str, name: str, folder: bool, checks: list[str], lost: list[str]) -> str:
    """A model card in Markdown, with the header that model hubs read.

    Args:
        format: One of USE.
        name: Of the file or folder that the card describes.
        checks: What was compared, and how it came out.
        lost: What the format does not hold.
    """
    about, description = weights.classifier, weights.description
    licence = description.get("licence", UNKNOWN_LICENCE)
    load = f"import mae\n\nmodel = mae.{'load' if weights.has_decoder else 'load_encoder'}"
    if about:
        load = "from mae.weights.classifier import load_classifier\n\nmodel = load_classifier"
    local = f'model = timm.create_model("local-dir:{name}", pretrained=True)'
    if not folder:
        arguments = ", ".join(f"{key}={value!r}" for key, value in timm_arguments(weights).items())
        local = f'model = timm.create_model("vit_base_patch16_224", checkpoint_path="{name}", {arguments})'
    hf = hf_config(weights)["architectures"][0]
    use = USE[format].format(
        load=load,
        name=name,
        timm=local,
        hf=hf,
        hf_more=", add_pooling_layer=False" if hf == "ViTModel" else "",  # it would be random
        feed=", ".join(f'"{what}": {what}' for what in description.get("takes", [])),
    )
    head = {"library_name": {"timm": "timm", "hf": "transformers"}.get(format, "vit-mae-lightning")}
    head |= {"pipeline_tag": "image-classification" if about else "image-feature-extraction"}
    if re.fullmatch(r"[\w.-]+|CC BY-NC 4\.0", licence):
        head["license"] = licence.lower().replace(" ", "-")
    title = architecture_name(weights)
    rows = {
        "architecture": title,
        "holds": {"classifier": "a classifier", "autoencoder": "encoder and decoder"}.get(weights.holds, "an encoder"),
        "parameters": f"{sum(value.numel() for value in weights.state.values()):,}",
        "images": "mean {}, std {} of channels in [0, 1]".format(
            *(", ".join(f"{value:.4g}" for value in description[key]) for key in ("mean", "std"))
        ),
    }
    if weights.has_decoder:
        rows["the decoder predicts"] = f"{weights.target}, {description['mask_ratio']:g} of the patches hidden"
    if about:
        rows["classes"] = f"{len(about['classes'])}, from the {about['pool']} of tokens"
    rows |= {key: str(description[key]) for key in ("step", "images_seen") if key in description}
    rows |= {"converted from": f"{weights.source.name} ({weights.format} format)", "licence": licence}
    lines = ["---", *(f"{key}: {value}" for key, value in head.items()), "tags: [mae, vit]", "---", ""]
    lines += [f"# {title} by masked autoencoding", "", "```python", use, "```", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
    for heading, items in (("Checked", checks), ("Left out", lost), ("Assumed", list(weights.notes))):
        if items:
            lines += [f"## {heading}", "", *(f"- {item}" for item in items), ""]
    lines += ["He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377.", ""]
    return "\n".join(lines)


def write_config(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
