"""Karlo's tables of names: which tensor of diffusers' files is which of our parameters (prior, decoder, upsamplers).

Every table takes a config that karlo.py's exports accept: what diffusers cannot express has no name there.
"""

from collections.abc import Iterator

from unclip_jax.config import DecoderConfig, PriorConfig, TransformerConfig, UNetConfig, UpsamplerConfig
from unclip_jax.interop.names import Entry, Path, conv, linear, norm
from unclip_jax.models.unet import level_widths


def prior_entries(config: PriorConfig) -> list[Entry]:
    """diffusers' PriorTransformer, without the two constants that its file holds besides (whitening_entries)."""
    width, z = config.transformer.width, config.embedding_dim
    return [
        Entry("positional_embedding", (1, config.context_length + 4, width), ("positions",)),
        Entry("prd_embedding", (1, 1, width), ("query",)),
        *linear("time_embedding.linear_1", ("time_0",), width, width),
        *linear("time_embedding.linear_2", ("time_1",), width, width),
        *linear("proj_in", ("image_in",), z, width),
        *linear("embedding_proj", ("text_in",), z, width),
        *linear("encoder_hidden_states_proj", ("states_in",), config.text_dim, width),
        *(entry for layer in range(config.transformer.layers) for entry in _prior_block(config.transformer, layer)),
        *norm("norm_out", ("norm",), width),
        *linear("proj_to_clip_embeddings", ("out",), width, z),
    ]


def whitening_entries(config: PriorConfig) -> list[Entry]:
    """The constants in the prior's file; the paths are those of a checkpoint's constants."""
    shape = (1, config.embedding_dim)
    return [Entry("clip_mean", shape, ("whitening", "mean")), Entry("clip_std", shape, ("whitening", "std"))]


def decoder_entries(config: DecoderConfig) -> tuple[list[Entry], list[Entry]]:
    """diffusers' UNet2DConditionModel and UnCLIPTextProjModel: two files, which together fill our one tree."""
    z, text, context = config.image_embedding_dim, config.text_dim, config.unet.context_dim or 0
    time = config.unet.embedding_dim
    projections = [
        Entry("learned_classifier_free_guidance_embeddings", (z,), ("null_image",)),
        *linear("embedding_proj", ("text_to_time",), z, time),
        *linear("clip_image_embeddings_project_to_time_embeddings", ("image_to_time",), z, time),
        *linear("clip_extra_context_tokens_proj", ("image_to_tokens",), z, config.extra_tokens * context),
        *linear("encoder_hidden_states_proj", ("text_to_context",), text, context),
        *norm("text_encoder_hidden_states_norm", ("text_norm",), context),
    ]
    return list(_unet(config.unet)), projections


def upsampler_entries(config: UpsamplerConfig) -> list[Entry]:
    """diffusers' UNet2DModel."""
    return list(_unet(config.unet))


def _prior_block(config: TransformerConfig, layer: int) -> Iterator[Entry]:
    theirs, ours, width = f"transformer_blocks.{layer}", ("transformer", f"block_{layer}"), config.width
    hidden = int(width * config.mlp_ratio)
    yield from norm(f"{theirs}.norm1", (*ours, "norm_attention"), width)
    yield from linear(f"{theirs}.attn1.to_q", (*ours, "query"), width, width)
    yield from linear(f"{theirs}.attn1.to_k", (*ours, "key"), width, width)
    yield from linear(f"{theirs}.attn1.to_v", (*ours, "value"), width, width)
    yield from linear(f"{theirs}.attn1.to_out.0", (*ours, "project"), width, width)
    yield from norm(f"{theirs}.norm3", (*ours, "norm_mlp"), width)
    yield from linear(f"{theirs}.ff.net.0.proj", (*ours, "mlp_in"), width, hidden)
    yield from linear(f"{theirs}.ff.net.2", (*ours, "mlp_out"), hidden, width)


def _unet(config: UNetConfig) -> Iterator[Entry]:
    widths, time, modulated = level_widths(config), config.embedding_dim, 2 if config.scale_shift else 1
    lowest = len(widths) - 1

    def residual(theirs: str, name: str, inputs: int, width: int) -> Iterator[Entry]:
        ours = ("unet", name)
        yield from norm(f"{theirs}.norm1", (*ours, "norm_0"), inputs)
        yield from conv(f"{theirs}.conv1", (*ours, "conv_0"), inputs, width)
        yield from linear(f"{theirs}.time_emb_proj", (*ours, "embedding"), time, modulated * width)
        yield from norm(f"{theirs}.norm2", (*ours, "norm_1"), width)
        yield from conv(f"{theirs}.conv2", (*ours, "conv_1"), width, width)
        if inputs != width:
            yield from conv(f"{theirs}.conv_shortcut", (*ours, "skip"), inputs, width, side=1)

    yield from conv("conv_in", ("unet", "stem"), config.in_channels, widths[0])
    yield from linear("time_embedding.linear_1", ("unet", "time_0"), config.channels, time)
    yield from linear("time_embedding.linear_2", ("unet", "time_1"), time, time)

    skips, inputs = [widths[0]], widths[0]
    for level, width in enumerate(widths):
        theirs = f"down_blocks.{level}"
        for block in range(config.depth):
            yield from residual(f"{theirs}.resnets.{block}", f"down_{level}_{block}", inputs, width)
            if 2**level in config.attention_factors:
                name = f"down_{level}_attention_{block}"
                yield from _attention(f"{theirs}.attentions.{block}", ("unet", name), width, config.context_dim)
            skips.append(inputs := width)
        if level < lowest:
            yield from residual(f"{theirs}.downsamplers.0", f"down_{level}_downsample", width, width)
            skips.append(width)

    yield from residual("mid_block.resnets.0", "middle_0", inputs, inputs)
    if config.middle_attention:
        yield from _attention("mid_block.attentions.0", ("unet", "middle_attention"), inputs, config.context_dim)
    yield from residual("mid_block.resnets.1", "middle_1", inputs, inputs)

    for level, width in reversed(list(enumerate(widths))):
        theirs = f"up_blocks.{lowest - level}"
        for block in range(config.depth + 1):
            yield from residual(f"{theirs}.resnets.{block}", f"up_{level}_{block}", inputs + skips.pop(), width)
            if 2**level in config.attention_factors:
                name = f"up_{level}_attention_{block}"
                yield from _attention(f"{theirs}.attentions.{block}", ("unet", name), width, config.context_dim)
            inputs = width
        if level > 0:
            yield from residual(f"{theirs}.upsamplers.0", f"up_{level}_upsample", width, width)

    yield from norm("conv_norm_out", ("unet", "out_norm"), widths[0])
    yield from conv("conv_out", ("unet", "out"), widths[0], config.out_channels)


def _attention(theirs: str, ours: Path, width: int, context: int | None) -> Iterator[Entry]:
    yield from norm(f"{theirs}.group_norm", (*ours, "norm"), width)
    yield from linear(f"{theirs}.to_q", (*ours, "query"), width, width)
    yield from linear(f"{theirs}.to_k", (*ours, "key"), width, width)
    yield from linear(f"{theirs}.to_v", (*ours, "value"), width, width)
    if context is not None:
        yield from linear(f"{theirs}.add_k_proj", (*ours, "context_key"), context, width)
        yield from linear(f"{theirs}.add_v_proj", (*ours, "context_value"), context, width)
    yield from linear(f"{theirs}.to_out.0", (*ours, "out"), width, width)
