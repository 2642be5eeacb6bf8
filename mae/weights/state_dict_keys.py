"""The names of the same tensors in other software: the official code, timm, Hugging Face's transformers.

Ours are those of MaskedAutoencoder: timm's behind `encoder.`, and the official ones of the decoder. A classifier is all
encoder, its head included. Values are never changed; only Hugging Face keeps queries, keys and values apart.
"""

import re
from typing import Literal

import torch
from torch import Tensor

Dialect = Literal["mae", "official", "hf"]  # timm's names are the official ones of an encoder

State = dict[str, Tensor]

ENCODER = "encoder."

DECODER = ("decoder_", "mask_token")  # how the names of a decoder's tensors begin, with us and officially


# As in the files on Hugging Face's hub. In memory transformers 5 has others, and in what it writes others again for a
# decoder's blocks: HF_SPELLINGS makes the first of each.
HF_NAMES = {
    "vit.embeddings.cls_token": "encoder.cls_token",
    "vit.embeddings.position_embeddings": "encoder.pos_embed",
    "vit.embeddings.patch_embeddings.projection.": "encoder.patch_embed.proj.",
    "vit.encoder.layer.": "encoder.blocks.",
    "vit.layernorm.": "encoder.norm.",
    "classifier.": "encoder.head.",
    "decoder.decoder_layers.": "decoder_blocks.",
    "decoder.mask_token": "mask_token",
    "decoder.": "",
}

HF_BLOCK = {
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "attention.attention.query.": "attn.query.",
    "attention.attention.key.": "attn.key.",
    "attention.attention.value.": "attn.value.",
    "attention.output.dense.": "attn.proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}

HF_SPELLINGS = (
    (r"^(?=(embeddings|encoder\.layer|layers|layernorm)\.)", "vit."),  # of an encoder by itself
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)

BLOCK = re.compile(r"(encoder\.blocks\.|decoder_blocks\.)(\d+\.)(.*)")

PARTS = ("query", "key", "value")


def bare(key: str) -> str:
    """Without what wrappers put before a name: DDP, torch.compile, a LightningModule."""
    return re.sub(r"^((module|_orig_mod|model)\.)+", "", key).replace("._orig_mod.", ".")


def dialect_of(state: State) -> Dialect | None:
    """Whose names these are; None: nobody's that is known here."""
    if any(re.match(r"(vit\.)?embeddings\.(patch_embeddings|cls_token|position_embeddings)", key) for key in state):
        return "hf"
    if any(key.startswith((f"{ENCODER}patch_embed.", f"{ENCODER}blocks.")) for key in state):
        return "mae"
    if any(key.startswith(("patch_embed.", "blocks.")) for key in state):
        return "official"
    return None


def to_ours(state: State, dialect: Dialect) -> State:
    """Under our names. A name that the dialect does not know stays as it is."""
    if dialect == "mae":
        return dict(state)
    if dialect == "official":
        return {official_to_ours(key): value for key, value in state.items()}
    ours = {hf_to_ours(key): value for key, value in state.items()}
    for key in [key for key in ours if ".attn.query." in key]:
        parts = [key.replace(".attn.query.", f".attn.{part}.") for part in PARTS]
        if all(part in ours for part in parts):
            ours[key.replace(".attn.query.", ".attn.qkv.")] = torch.cat([ours.pop(part) for part in parts])
    return ours


def from_ours(state: State, dialect: Dialect) -> State:
    """The inverse of `to_ours`."""
    if dialect == "mae":
        return dict(state)
    if dialect == "official":
        return {official_name(key): value for key, value in state.items()}
    theirs: State = {}
    for key, value in state.items():
        if ".attn.qkv." not in key:
            theirs[ours_to_hf(key)] = value
            continue
        for part, chunk in zip(PARTS, value.chunk(3), strict=True):
            theirs[ours_to_hf(key.replace(".attn.qkv.", f".attn.{part}."))] = chunk.contiguous()
    return theirs


def official_to_ours(key: str) -> str:
    return key if key.startswith(DECODER) else ENCODER + key


def official_name(key: str) -> str:
    """Of one of our tensors."""
    return key.removeprefix(ENCODER)


def hf_to_ours(key: str) -> str:
    for pattern, spelling in HF_SPELLINGS:
        key = re.sub(pattern, spelling, key)
    for theirs, ours in HF_NAMES.items():
        if key.startswith(theirs):
            return BLOCK.sub(lambda m: m[1] + m[2] + renamed(m[3], HF_BLOCK), ours + key.removeprefix(theirs))
    return key


def ours_to_hf(key: str) -> str:
    if match := BLOCK.fullmatch(key):
        key = match[1] + match[2] + renamed(match[3], {ours: theirs for theirs, ours in HF_BLOCK.items()})
    for theirs, ours in HF_NAMES.items():
        if key.startswith(ours):  # the last, the empty one, fits all
            return theirs + key.removeprefix(ours)
    raise AssertionError(key)


def renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key
