"""Names of the same tensors in this project, the official code, timm, transformers, torchvision and mmpretrain.

Our names are those of MaskedAutoencoder: timm's behind `encoder.`, and the official ones for the decoder. All names of
a classifier, also those of its head, begin with `encoder.`. Values are never changed, but transformers stores queries,
keys and values as three tensors.
"""

import re
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

# timm's names are the official ones of an encoder. The last two are only read.
Dialect = Literal["mae", "official", "hf", "torchvision", "mmpretrain"]

State = dict[str, Tensor]

ENCODER = "encoder."

DECODER = ("decoder_", "mask_token")  # prefixes of the decoder's tensors, in our names and the official ones

# The names in files on Hugging Face's hub. transformers 5 has other names in memory, and others again for a decoder's
# blocks in the files that it writes: HF_SPELLINGS turns each into the name on the hub.
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

BLOCK_KEY = re.compile(r"(encoder\.blocks\.|decoder_blocks\.)(\d+\.)(.*)")

QKV = ("query", "key", "value")

# torchvision's and mmpretrain's names, turned into timm's one after the other.
BLOCK_SPELLINGS = (
    (r"\.ln_?([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)

ENCODER_SPELLINGS = (
    (r"^(patch_embed\.projection|conv_proj)\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^(encoder\.layers\.encoder_layer_|layers\.)", "blocks."),
    (r"^(encoder\.ln|ln1)\.", "norm."),
    (r"^ln2\.", "fc_norm."),
    (r"^heads\.head\.", "head."),
    *BLOCK_SPELLINGS,
)

# Of a decoder that is a module of its own.
DECODER_SPELLINGS = (
    (r"^(layers\.encoder_layer_|blocks\.)", "decoder_blocks."),
    (r"^pos_embed(ding)?$", "decoder_pos_embed"),
    (r"^(ln1?|norm)\.", "decoder_norm."),
    (r"^prediction_head\.", "decoder_pred."),
    *BLOCK_SPELLINGS,
)


def bare_name(key: str) -> str:
    """The name without what DDP and torch.compile add to it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", key).replace("._orig_mod.", ".")


def dialect_of(state: State) -> Dialect | None:
    """Which software's names these are; None if they are unknown."""
    if any(re.match(r"(vit\.)?embeddings\.(patch_embeddings|cls_token|position_embeddings)", key) for key in state):
        return "hf"
    if any(key.startswith((f"{ENCODER}patch_embed.", f"{ENCODER}blocks.")) for key in state):
        return "mae"
    if any(key.startswith(("patch_embed.", "blocks.")) for key in state):
        return "official"
    return None


def to_ours(state: State, dialect: Dialect) -> State:
    """The tensors under our names. A name that the dialect does not know stays as it is."""
    if dialect == "mae":
        return dict(state)
    if dialect in ("torchvision", "mmpretrain"):
        return {ENCODER + respelled(key, ENCODER_SPELLINGS): value for key, value in state.items()}
    if dialect == "official":
        return {official_to_ours(key): value for key, value in state.items()}
    ours = {hf_to_ours(key): value for key, value in state.items()}
    for key in [key for key in ours if ".attn.query." in key]:
        parts = [key.replace(".attn.query.", f".attn.{part}.") for part in QKV]
        if all(part in ours for part in parts):
            ours[key.replace(".attn.query.", ".attn.qkv.")] = torch.cat([ours.pop(part) for part in parts])
    return ours


def from_ours(state: State, dialect: Dialect) -> State:
    """The tensors under the names of a dialect: the inverse of `to_ours`."""
    if dialect == "mae":
        return dict(state)
    if dialect == "official":
        return {official_name(key): value for key, value in state.items()}
    theirs: State = {}
    for key, value in state.items():
        if ".attn.qkv." not in key:
            theirs[ours_to_hf(key)] = value
            continue
        for part, chunk in zip(QKV, value.chunk(3), strict=True):
            theirs[ours_to_hf(key.replace(".attn.qkv.", f".attn.{part}."))] = chunk.contiguous()
    return theirs


def official_to_ours(key: str) -> str:
    return key if key.startswith(DECODER) else ENCODER + key


def official_name(key: str) -> str:
    """The official name of one of our tensors."""
    return key.removeprefix(ENCODER)


def hf_to_ours(key: str) -> str:
    key = respelled(key, HF_SPELLINGS)
    for theirs, ours in HF_NAMES.items():
        if key.startswith(theirs):
            return BLOCK_KEY.sub(lambda m: m[1] + m[2] + renamed(m[3], HF_BLOCK), ours + key.removeprefix(theirs))
    return key


def ours_to_hf(key: str) -> str:
    if match := BLOCK_KEY.fullmatch(key):
        key = match[1] + match[2] + renamed(match[3], {ours: theirs for theirs, ours in HF_BLOCK.items()})
    for theirs, ours in HF_NAMES.items():
        if key.startswith(ours):  # the last, empty one matches every name
            return theirs + key.removeprefix(ours)
    raise AssertionError(key)


def spelled_decoder(key: str) -> str:
    """Our name of a tensor in a decoder that is a module of its own; an unknown name stays as it is."""
    return respelled(key, DECODER_SPELLINGS)


def respelled(key: str, spellings: Iterable[tuple[str, str]]) -> str:
    for pattern, spelling in spellings:
        key = re.sub(pattern, spelling, key)
    return key


def renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key
