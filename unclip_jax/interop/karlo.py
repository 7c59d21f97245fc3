"""Karlo's networks and schedulers as diffusers' JSON configs, read and written strictly.

A setting that diffusers fills with a default may be absent; one that we cannot express, or do not know, is an error
that names it, and so is what diffusers cannot express of a config of ours. What only training knows (drop rates,
degradations, loss weights) has no place in either direction.
"""

import math
from typing import Any

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.config import (
    DecoderConfig,
    DiffusionConfig,
    PredictionType,
    PriorConfig,
    TransformerConfig,
    UNetConfig,
    UpsamplerConfig,
)
from unclip_jax.interop.karlo_settings import (
    DECODER,
    DEEPEST,
    LARGEST,
    NORM_EPSILON,
    PRIOR,
    PROJECTIONS,
    SCHEDULER,
    UPSAMPLER,
    Reader,
    Settings,
    refuse,
    settings,
)
from unclip_jax.models.unet import level_widths

MLP_RATIO = 4.0  # no setting of diffusers' prior


def prior_config(config: Settings) -> PriorConfig:
    """The network of a PriorTransformer's config; CheckpointError where it is another one."""
    read = Reader(PRIOR, config)
    heads, head_dim = read.count("num_attention_heads"), read.count("attention_head_dim")
    transformer = TransformerConfig(
        width=heads * head_dim,
        layers=read.count("num_layers", DEEPEST),
        heads=heads,
        causal=True,
        dropout=read.number("dropout"),
    )
    z = read.count("embedding_dim")
    return PriorConfig(z, z, read.count("num_embeddings"), transformer, unit_length=False)


def prior_json(config: PriorConfig) -> dict[str, Any]:
    """The inverse of prior_config; CheckpointError naming what diffusers lacks."""
    inner, z = config.transformer, config.embedding_dim
    head_dim = inner.head_dim or inner.width // inner.heads
    refuse(
        PRIOR,
        {
            f"text states of width {config.text_dim} beside embeddings of {z}": config.text_dim != z,
            "embeddings of unit length": config.unit_length,
            "attention without a causal mask": not inner.causal,
            f"activation {inner.activation}": inner.activation != "gelu",
            f"norm_epsilon {inner.norm_epsilon}": inner.norm_epsilon != NORM_EPSILON,
            f"mlp_ratio {inner.mlp_ratio}": inner.mlp_ratio != MLP_RATIO,
            f"{inner.heads} heads of {head_dim} in a width of {inner.width}": inner.heads * head_dim != inner.width,
        },
    )
    return settings(
        PRIOR,
        attention_head_dim=head_dim,
        dropout=inner.dropout,
        embedding_dim=z,
        num_attention_heads=inner.heads,
        num_embeddings=config.context_length,
        num_layers=inner.layers,
    )


def decoder_config(unet: Settings, projections: Settings, context_length: int = 77) -> DecoderConfig:
    """The network of the configs of a UNet2DConditionModel and its UnCLIPTextProjModel, which must fit each other."""
    read, beside = Reader(DECODER, unet), Reader(PROJECTIONS, projections)
    network = _unet(read, conditional=True)
    beside.require("cross_attention_dim", network.context_dim)
    beside.require("time_embed_dim", network.embedding_dim)
    read.require("out_channels", 2 * network.in_channels)  # a prediction and its variance
    z = beside.count("clip_embeddings_dim")
    return DecoderConfig(
        network,
        size=read.count("sample_size"),
        image_embedding_dim=z,
        text_dim=z,
        extra_tokens=beside.count("clip_extra_context_tokens"),
        context_length=context_length,
        empty_null_text=True,
    )


def decoder_json(config: DecoderConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of decoder_config: the U-Net's settings and the projections'."""
    unet, z = config.unet, config.image_embedding_dim
    refuse(
        DECODER,
        _beyond(unet)
        | {
            "middle block without attention": not unet.middle_attention,
            f"norm_epsilon {unet.norm_epsilon}": unet.norm_epsilon != NORM_EPSILON,
            "decoder without learned variances": unet.out_channels != 2 * unet.in_channels,
            "image_scale": config.image_scale != 1,
            f"text states of width {config.text_dim} beside embeddings of {z}": config.text_dim != z,
            "decoder without a text embedding": not config.text_embedding,
            "learned null text": config.learned_null_text,
            "null text but the empty caption's": not config.empty_null_text,
            "text encoder of the decoder's own": config.text_encoder is not None,
        },
    )
    network = settings(
        DECODER,
        attention_head_dim=unet.head_channels,
        cross_attention_dim=unet.context_dim,
        sample_size=config.size,
        **_unet_settings(unet),
    )
    projections = settings(
        PROJECTIONS,
        clip_embeddings_dim=z,
        clip_extra_context_tokens=config.extra_tokens,
        cross_attention_dim=unet.context_dim,
        time_embed_dim=unet.embedding_dim,
    )
    return network, projections


def upsampler_config(config: Settings, low_size: int = 64, size: int | None = None) -> UpsamplerConfig:
    """The network of a UNet2DModel's config; size serves where it names none, as Karlo's super_res_last does not."""
    read = Reader(UPSAMPLER, config)
    network = _unet(read, conditional=False)
    read.require("in_channels", 6)  # x_t and the low-resolution picture
    if network.out_channels != 6:  # no variance beside the prediction
        read.require("out_channels", 3)
    if read.values["sample_size"] is not None or size is None:
        size = read.count("sample_size")
    return UpsamplerConfig(network, low_size, size)


def upsampler_json(config: UpsamplerConfig) -> dict[str, Any]:
    """The inverse of upsampler_config; low_size has no place there and comes from the decoder."""
    unet = config.unet
    refuse(
        UPSAMPLER,
        _beyond(unet)
        | {
            "attention in upsamplers": unet.middle_attention or any(_attending(unet)),
            "text encoder": config.text_encoder is not None or unet.context_dim is not None,
            "upsampler that adds to the resized picture": config.residual,
            f"upsampler that reads {unet.in_channels} channels": unet.in_channels != 6,
            f"upsampler that gives {unet.out_channels} channels": unet.out_channels not in (3, 6),
        },
    )
    return settings(
        UPSAMPLER,
        attention_head_dim=UPSAMPLER.read["attention_head_dim"],
        norm_eps=unet.norm_epsilon,
        sample_size=config.size,
        **_unet_settings(unet),
    )


def diffusion_config(config: Settings) -> DiffusionConfig:
    """The noise process of an UnCLIPScheduler's config, which samples as our ddpm with the variances it says."""
    read = Reader(SCHEDULER, config)
    kinds: dict[str, PredictionType] = {"epsilon": "epsilon", "sample": "x0"}
    variances = {"fixed_small_log": False, "learned_range": True}
    return DiffusionConfig(
        steps=read.count("num_train_timesteps"),
        prediction=kinds[read.choice("prediction_type", kinds)],
        learned_variance=variances[read.choice("variance_type", variances)],
        clip=read.number("clip_sample_range") if read.flag("clip_sample") else None,
    )


def diffusion_json(config: DiffusionConfig) -> dict[str, Any]:
    """The inverse of diffusion_config; CheckpointError naming what an UnCLIPScheduler lacks."""
    refuse(
        SCHEDULER,
        {f"{config.schedule} schedule": config.schedule != "cosine", "v-prediction": config.prediction == "v"},
    )
    return settings(
        SCHEDULER,
        clip_sample=config.clip is not None,
        clip_sample_range=1.0 if config.clip is None else config.clip,
        num_train_timesteps=config.steps,
        prediction_type="sample" if config.prediction == "x0" else "epsilon",
        variance_type="learned_range" if config.learned_variance else "fixed_small_log",
    )


def _unet(read: Reader, conditional: bool) -> UNetConfig:
    """What both kinds of U-Net say alike, and the attention of the conditional one."""
    widths, kinds = read.levels("block_out_channels"), read.levels("down_block_types")
    attending = [conditional and kind == _blocks("Down", [True])[0] for kind in kinds]
    read.require("down_block_types", _blocks("Down", attending))
    read.require("up_block_types", _blocks("Up", attending[::-1]))
    if len(widths) != len(kinds) or any(type(width) is not int or not 0 < width <= LARGEST for width in widths):
        raise CheckpointError(f"{read.name} has block_out_channels {widths} for {len(kinds)} levels")
    config = UNetConfig(
        in_channels=read.count("in_channels"),
        out_channels=read.count("out_channels"),
        channels=widths[0],
        multipliers=tuple(_multiplier(width, widths[0]) for width in widths),
        depth=read.count("layers_per_block", DEEPEST),
        attention_factors=tuple(2**level for level, attends in enumerate(attending) if attends),
        head_channels=read.count("attention_head_dim") if conditional else UNetConfig.head_channels,
        context_dim=read.count("cross_attention_dim") if conditional else None,
        scale_shift=read.choice("resnet_time_scale_shift", ("default", "scale_shift")) == "scale_shift",
        middle_attention=conditional,
        groups=read.count("norm_num_groups"),
        norm_epsilon=NORM_EPSILON if conditional else read.number("norm_eps"),
        dropout=read.number("dropout"),
    )
    try:
        level_widths(config)
    except ValueError as error:
        raise CheckpointError(f"a {read.name} of these settings cannot be built: {error}") from None
    return config


def _unet_settings(config: UNetConfig) -> dict[str, Any]:
    """The settings that both kinds of U-Net have in common."""
    attending = _attending(config)
    return {
        "block_out_channels": list(level_widths(config)),
        "down_block_types": _blocks("Down", attending),
        "dropout": config.dropout,
        "in_channels": config.in_channels,
        "layers_per_block": config.depth,
        "norm_num_groups": config.groups,
        "out_channels": config.out_channels,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "up_block_types": _blocks("Up", attending[::-1]),
    }


def _beyond(config: UNetConfig) -> dict[str, bool]:
    """What no U-Net of diffusers has."""
    return {
        f"patch stem of {config.patch} x {config.patch} pixels": config.patch != 1,
        "learned positions": config.position_grid is not None,
    }


def _attending(config: UNetConfig) -> list[bool]:
    return [2**level in config.attention_factors for level in range(len(config.multipliers))]


def _blocks(side: str, attending: list[bool]) -> list[str]:
    """The types of blocks from the outer level to the lowest or back."""
    return [f"SimpleCrossAttn{side}Block2D" if attends else f"Resnet{side}sampleBlock2D" for attends in attending]


def _multiplier(width: int, channels: int) -> int | float:
    """What int(channels * multiplier) takes back to width."""
    if width % channels == 0:
        return width // channels
    exact = width / channels
    return exact if int(channels * exact) == width else math.nextafter(exact, math.inf)
