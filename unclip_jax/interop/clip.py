"""CLIP in Hugging Face's layout, both ways: configs, names of tensors, and a folder that CLIPModel loads.

The layout is that of transformers' CLIPModel, and of the separate towers (CLIPTextModelWithProjection,
CLIPVisionModelWithProjection) that Karlo, Kandinsky and Stable unCLIP ship: OpenAI's models and OpenCLIP's conversions.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.writing import replacing, save_file, write_json
from unclip_jax.config import ClipConfig, TransformerConfig
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.interop.clip_pixels import channel_statistics, preprocessor
from unclip_jax.interop.clip_tokenizer import HubTokenizer, save_tokenizer
from unclip_jax.interop.names import Entry, conv, export, linear, norm
from unclip_jax.models.clip import Clip, ImageTower, TextTower
from unclip_jax.types import Params

IGNORED = ("*.embeddings.position_ids",)  # buffers that old files carry
LEGACY_END = 2  # this eos_token_id means: the end of text is the largest id of a row (transformers' rule)
MOST = 2**24  # of any size in a config, and 1,000 layers: a hostile one must not build tables without end

# What a config that leaves a value out means; transformers' defaults are those of ViT-B/32.
_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "projection_dim": 512}
_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 512}


def clip_config(*parts: Any, pixels: dict[str, Any] | None = None) -> ClipConfig:
    """The config of a CLIP from what Hugging Face's `config.json` says.

    parts: as JSON gave them, one CLIPModel's, or a text tower's and an image tower's in any order; a tower that is not
    given keeps ClipConfig's defaults. pixels: its `preprocessor_config.json`; without one the channel statistics are
    OpenAI's.
    CheckpointError for another family, and for whatever ClipConfig cannot express, which it names.
    """
    text = vision = None
    for part in parts:
        match part.get("model_type") if isinstance(part, dict) else None:
            case "clip":
                shared = {"projection_dim": part.get("projection_dim", 512)}
                text, vision = _tower(part, "text") | shared, _tower(part, "vision") | shared
            case "clip_text_model":
                text = part
            case "clip_vision_model":
                vision = part
            case other:
                raise CheckpointError(
                    f"the config is of a model of type {other!r}: expected one of CLIP's, "
                    "which are clip, clip_text_model and clip_vision_model"
                )
    # Theirs has no cap: its training kept the scale below 100 by other means.
    fields: dict[str, Any] = {"max_logit_scale": math.inf}
    if text is not None:
        text = _TEXT | text
        end = _whole(text, "eos_token_id", 49407, least=0)
        fields |= {
            "text": _transformer(text, causal=True),
            "embedding_dim": _whole(text, "projection_dim"),
            "vocab_size": _whole(text, "vocab_size", 49408),
            "context_length": _whole(text, "max_position_embeddings", 77),
            "eos_id": None if end == LEGACY_END else end,
        }
    if vision is not None:
        vision = _VISION | vision
        width = _whole(vision, "projection_dim")
        if width != fields.get("embedding_dim", width):
            raise CheckpointError(
                f"the text tower gives embeddings of {fields['embedding_dim']} numbers and the image tower of {width}: "
                "they are not of one CLIP"
            )
        if vision.get("num_channels", 3) != 3:
            raise CheckpointError(f"the config's num_channels is {vision['num_channels']!r}: pictures here have 3")
        fields |= {
            "vision": _transformer(vision, causal=False),
            "embedding_dim": width,
            "image_size": _whole(vision, "image_size", 224),
            "patch_size": _whole(vision, "patch_size", 32),
        }
    if pixels is not None:
        fields |= channel_statistics(pixels, fields.get("image_size"))
    return ClipConfig(**fields)


def _tower(config: dict[str, Any], tower: str) -> dict[str, Any]:
    """A tower's part of a CLIPModel's config; early files repeat it as text_config_dict, which then counts."""
    part = config.get(f"{tower}_config_dict")
    part = config.get(f"{tower}_config") if part is None else part
    if not isinstance(part or {}, dict):
        raise CheckpointError(f"the config's {tower}_config is {part!r}, expected a table of values")
    return part or {}


def _transformer(config: dict[str, Any], causal: bool) -> TransformerConfig:
    width, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
    if width % heads:
        raise CheckpointError(f"the config's hidden_size {width} is not a multiple of its num_attention_heads {heads}")
    epsilon = config.get("layer_norm_eps", 1e-5)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise CheckpointError(f"the config's layer_norm_eps is {epsilon!r}, expected a number between 0 and 1")
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise CheckpointError(f"the config's hidden_act is {activation!r}: only gelu and quick_gelu exist here")
    hidden = _whole(config, "intermediate_size")
    ratio = hidden / width
    if int(width * ratio) < hidden:  # the product may round to just below
        ratio = math.nextafter(ratio, math.inf)
    layers = _whole(config, "num_hidden_layers", 12, most=1000)
    return TransformerConfig(
        width, layers, heads, mlp_ratio=ratio, activation=activation, norm_epsilon=epsilon, causal=causal
    )


def _whole(config: dict[str, Any], key: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
    value = config.get(key, default)
    if type(value) is not int or not least <= value <= most:
        raise CheckpointError(f"the config's {key} is {value!r}, expected a whole number from {least} to {most}")
    return value


def hf_config(config: ClipConfig) -> dict[str, Any]:
    """The `config.json` of a CLIPModel of this config, the inverse of clip_config; CheckpointError for what CLIPModel
    cannot be: towers of other attention or heads, or an end of text whose id has a second meaning there.
    """
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embedding_dim,
        "logit_scale_init_value": math.log(1 / config.temperature),
        "text_config": hf_text_config(config),
        "vision_config": hf_vision_config(config),
    }


def hf_text_config(config: ClipConfig) -> dict[str, Any]:
    """The `config.json` of the text tower alone, a CLIPTextModelWithProjection; raises as hf_config does."""
    if config.eos_id == LEGACY_END:
        raise CheckpointError(
            f"CLIPModel cannot end texts with the id {LEGACY_END}: it reads that number as 'the largest id'"
        )
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "projection_dim": config.embedding_dim,
        **_hf_transformer(config.text, "text", causal=True),
        # As in OpenAI's published configs; of the three only the last is ever read.
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": LEGACY_END if config.eos_id is None else config.eos_id,
    }


def hf_vision_config(config: ClipConfig) -> dict[str, Any]:
    """The `config.json` of the image tower alone, a CLIPVisionModelWithProjection; raises as hf_config does."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "projection_dim": config.embedding_dim,
        **_hf_transformer(config.vision, "image", causal=False),
    }


def _hf_transformer(config: TransformerConfig, name: str, causal: bool) -> dict[str, Any]:
    head_dim = config.head_dim or config.width // config.heads
    if config.causal != causal or head_dim * config.heads != config.width:
        raise CheckpointError(
            f"CLIPModel cannot express this {name} tower: its heads are width / heads wide (here {head_dim} of "
            f"{config.width} / {config.heads}) and its attention is {'' if causal else 'not '}causal"
        )
    return {
        "hidden_size": config.width,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_epsilon,
    }


def entries(config: ClipConfig) -> list[Entry]:
    """Every tensor of a CLIPModel."""
    return [*text_entries(config), *vision_entries(config), Entry("logit_scale", (), ("log_scale",))]


def text_entries(config: ClipConfig) -> list[Entry]:
    """Every tensor of a text tower with its projection."""
    width, prefix = config.text.width, "text_model.embeddings"
    words, places = (config.vocab_size, width), (config.context_length, width)
    return [
        Entry(f"{prefix}.token_embedding.weight", words, ("token_embedding", "embedding")),
        Entry(f"{prefix}.position_embedding.weight", places, ("text_positions",)),
        *_blocks("text_model", "text_transformer", config.text),
        *norm("text_model.final_layer_norm", ("text_norm",), width),
        *linear("text_projection", ("text_projection",), width, config.embedding_dim, bias=False),
    ]


def vision_entries(config: ClipConfig) -> list[Entry]:
    """Every tensor of an image tower with its projection."""
    width, prefix = config.vision.width, "vision_model.embeddings"
    places = (config.image_size // config.patch_size) ** 2 + 1
    return [
        Entry(f"{prefix}.class_embedding", (width,), ("class_token",)),
        *conv(f"{prefix}.patch_embedding", ("patches",), 3, width, config.patch_size, bias=False),
        Entry(f"{prefix}.position_embedding.weight", (places, width), ("image_positions",)),
        *norm("vision_model.pre_layrnorm", ("image_norm_in",), width),  # the published spelling
        *_blocks("vision_model", "image_transformer", config.vision),
        *norm("vision_model.post_layernorm", ("image_norm_out",), width),
        *linear("visual_projection", ("image_projection",), width, config.embedding_dim, bias=False),
    ]


def _blocks(theirs: str, ours: str, config: TransformerConfig) -> Iterator[Entry]:
    width, hidden = config.width, int(config.width * config.mlp_ratio)
    for layer in range(config.layers):
        there, here = f"{theirs}.encoder.layers.{layer}", (ours, f"block_{layer}")
        yield from norm(f"{there}.layer_norm1", (*here, "norm_attention"), width)
        for part, name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "project")):
            yield from linear(f"{there}.self_attn.{part}", (*here, name), width, width)
        yield from norm(f"{there}.layer_norm2", (*here, "norm_mlp"), width)
        yield from linear(f"{there}.mlp.fc1", (*here, "mlp_in"), width, hidden)
        yield from linear(f"{there}.mlp.fc2", (*here, "mlp_out"), hidden, width)


def shapes(config: ClipConfig) -> Params:
    """The tree of shapes that `entries` fills: Clip's parameters."""
    return jax.eval_shape(Clip(config).init, jax.random.key(0), _picture(config), _texts(config))["params"]


def text_shapes(config: ClipConfig) -> Params:
    """The tree of shapes that `text_entries` fills: TextTower's parameters."""
    init = partial(TextTower(config).init, method="encode_text")
    return jax.eval_shape(init, jax.random.key(0), _texts(config))["params"]


def vision_shapes(config: ClipConfig) -> Params:
    """The tree of shapes that `vision_entries` fills: ImageTower's parameters."""
    init = partial(ImageTower(config).init, method="encode_image")
    return jax.eval_shape(init, jax.random.key(0), _picture(config))["params"]


def _picture(config: ClipConfig) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)


def _texts(config: ClipConfig) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, config.context_length), jnp.int32)


def clip_tensors(params: Params, config: ClipConfig) -> dict[str, Any]:
    """A CLIP's parameters under CLIPModel's names, to be saved; a temperature beyond our cap is written as the cap."""
    tensors: dict[str, Any] = dict(export(entries(config), params))
    scale = np.asarray(tensors["logit_scale"])
    tensors["logit_scale"] = np.minimum(scale, np.asarray(math.log(config.max_logit_scale), scale.dtype))
    return tensors


def clip_folder(
    params: Params, config: ClipConfig, out: str | Path, tokenizer: ClipTokenizer | HubTokenizer | None = None
) -> None:
    """Writes config.json, model.safetensors, preprocessor_config.json and the tokenizer's files.

    `transformers.CLIPModel.from_pretrained(out)` loads them. Without a tokenizer the folder has none: ids come from the
    tokenizer that the CLIP was trained with. CheckpointError for a CLIP that CLIPModel cannot express, and where the
    folder cannot be written.
    """
    out, files = Path(out), {"config.json": hf_config(config), "preprocessor_config.json": preprocessor(config)}
    with replacing(out / "model.safetensors") as weights:
        if tokenizer is not None:
            save_tokenizer(tokenizer, out)
        for name, content in files.items():
            write_json(out / name, content)
        save_file(clip_tensors(params, config), weights, metadata={"format": "pt"})
