"""Karlo's original checkpoints (kakaobrain/karlo) under diffusers' names, so that one table of names serves both.

They differ in names, in queries, keys and values that share a tensor, head after head, and in 1 x 1 convolutions where
diffusers has linear maps. Karlo's two upsamplers share a file, and so do the decoder's U-Net and its projections; the
prior's whitening statistics have a file of their own. The mapping is that of diffusers'
scripts/convert_kakao_brain_unclip_to_diffusers.py.
"""

from collections.abc import Callable, Iterable

import numpy as np

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.sources import TensorSource
from unclip_jax.config import DecoderConfig, PriorConfig, UNetConfig, UpsamplerConfig
from unclip_jax.interop.karlo_names import decoder_entries, prior_entries, upsampler_entries
from unclip_jax.interop.names import Entry

PREFIX = "model."
FIRST_STEPS, LAST_STEP = "model_first_steps.", "model_last_step."

# Our part and the number of parts of a fused tensor, by diffusers' name of the part.
FUSED = {"to_q": (0, 3), "to_k": (1, 3), "to_v": (2, 3), "add_k_proj": (0, 2), "add_v_proj": (1, 2)}
PRIOR = {
    "positional_embedding": "positional_embedding",
    "prd_embedding": "prd_emb",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "proj_in": "clip_img_proj",
    "embedding_proj": "text_emb_proj",
    "encoder_hidden_states_proj": "text_enc_proj",
    "norm_out": "final_ln",
    "proj_to_clip_embeddings": "out_proj",
}
PRIOR_BLOCK = {
    "norm1": "ln_1",
    "attn1.to_q": "attn.c_qkv",
    "attn1.to_k": "attn.c_qkv",
    "attn1.to_v": "attn.c_qkv",
    "attn1.to_out.0": "attn.c_proj",
    "norm3": "ln_2",
    "ff.net.0.proj": "mlp.c_fc",
    "ff.net.2": "mlp.c_proj",
}
PROJECTIONS = {
    "learned_classifier_free_guidance_embeddings": "cf_param",
    "embedding_proj": "text_feat_proj",
    "clip_image_embeddings_project_to_time_embeddings": "clip_emb",
    "clip_extra_context_tokens_proj": "clip_tok_proj",
    "encoder_hidden_states_proj": "text_seq_proj.0",
    "text_encoder_hidden_states_norm": "text_seq_proj.1",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "add_k_proj": "encoder_kv",
    "add_v_proj": "encoder_kv",
    "to_out.0": "proj_out",
}


class OriginalSource(TensorSource):
    """An original checkpoint under diffusers' names.

    arrays: views of the original's; those cut out of a fused tensor keep its heads on an axis apart, which shapes and
    read join again. A tensor that no name of diffusers stands for has its own.
    """

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, as diffusers has it."""
        return {name: _joined(name, array.shape) for name, array in self.arrays.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor in diffusers' shape; of a fused one it is a copy."""
        array = super().read(name)
        return array.reshape(_joined(name, array.shape))


def original_prior(source: TensorSource, statistics: TensorSource, config: PriorConfig) -> OriginalSource:
    """The prior's checkpoint and ViT-L-14_stats.th, the pair of the embeddings' mean and deviation [z]."""
    if set(statistics.arrays) != {"0", "1"}:
        raise CheckpointError(
            f"'{statistics.path}' holds no pair of mean and deviation: give Karlo's ViT-L-14_stats.th"
        )
    head = config.transformer.head_dim or config.transformer.width // config.transformer.heads
    original = _renamed(source, prior_entries(config), _prior_module, PREFIX, head)
    mean, deviation = (statistics.read(name)[None] for name in ("0", "1"))
    return OriginalSource(source.path, {**original.arrays, "clip_mean": mean, "clip_std": deviation})


def original_decoder(source: TensorSource, config: DecoderConfig) -> OriginalSource:
    """The decoder's checkpoint, which has the names of both tables of decoder_entries."""
    unet, projections = decoder_entries(config)

    def module(theirs: str) -> str:
        return PROJECTIONS.get(theirs) or _unet_module(theirs, config.unet)

    return _renamed(source, [*unet, *projections], module, PREFIX, config.unet.head_channels)


def original_upsampler(source: TensorSource, config: UpsamplerConfig, last: bool) -> OriginalSource:
    """One of the upsampling checkpoint's two networks: that of the last step, or that of all before it."""
    own, other = (LAST_STEP, FIRST_STEPS) if last else (FIRST_STEPS, LAST_STEP)
    source = TensorSource(source.path, {k: array for k, array in source.arrays.items() if not k.startswith(other)})
    unet = config.unet
    return _renamed(
        source, upsampler_entries(config), lambda theirs: _unet_module(theirs, unet), own, unet.head_channels
    )


def _renamed(
    source: TensorSource, entries: Iterable[Entry], module: Callable[[str], str], prefix: str, head: int
) -> OriginalSource:
    """Every entry that the checkpoint has, and whatever it has besides."""
    arrays, used = {}, set()
    for entry in entries:
        stem, _, kind = entry.theirs.rpartition(".")
        name = prefix + (f"{module(stem)}.{kind}" if kind in ("weight", "bias") else module(entry.theirs))
        if name in source.arrays:
            used.add(name)
            arrays[entry.theirs] = _part(entry.theirs, source.read(name), head)
    return OriginalSource(source.path, arrays | {k: array for k, array in source.arrays.items() if k not in used})


def _prior_module(theirs: str) -> str:
    if not theirs.startswith("transformer_blocks."):
        return PRIOR[theirs]
    _, layer, inner = theirs.split(".", 2)
    return f"transformer.resblocks.{layer}.{PRIOR_BLOCK[inner]}"


def _unet_module(theirs: str, config: UNetConfig) -> str:
    """The original counts blocks through all levels, and a level's resampling follows its last block."""
    if theirs in UNET:
        return UNET[theirs]
    levels = len(config.multipliers)
    match theirs.split(".", 4):
        case ["mid_block", kind, index, inner, *rest]:
            inner = ".".join([inner, *rest])
            place = 1 if kind == "attentions" else int(index) * (1 + config.middle_attention)
            return f"middle_block.{place}.{UNET_BLOCK[inner]}"
        case ["down_blocks", level, kind, index, inner]:
            block = config.depth if kind == "downsamplers" else int(index)
            place = 1 + int(level) * (config.depth + 1) + block
            return f"input_blocks.{place}.{int(kind == 'attentions')}.{UNET_BLOCK[inner]}"
        case ["up_blocks", level, kind, index, inner]:
            attends = 2 ** (levels - 1 - int(level)) in config.attention_factors
            block, within = int(index), int(kind == "attentions")
            if kind == "upsamplers":
                block, within = config.depth, 1 + attends
            return f"output_blocks.{int(level) * (config.depth + 1) + block}.{within}.{UNET_BLOCK[inner]}"
    raise KeyError(theirs)


def _fused(theirs: str) -> tuple[int, int] | None:
    return FUSED.get(theirs.rpartition(".")[0].rpartition(".")[2])


def _part(theirs: str, array: np.ndarray, head: int) -> np.ndarray:
    """The view of a tensor that diffusers has under this name, heads apart where it was fused."""
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if (fused := _fused(theirs)) is None or array.shape[0] % (fused[1] * head):
        return array
    part, parts = fused
    return array.reshape(-1, parts, head, *array.shape[1:])[:, part]


def _joined(theirs: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if _fused(theirs) is None or len(shape) < 2:
        return shape
    return (shape[0] * shape[1], *shape[2:])
