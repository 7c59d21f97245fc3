"""What every compiled step of generation shares: its inputs, the options of a call, keys, samplers and limits."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from unclip_jax.config import ClipConfig, DecoderConfig, DiffusionConfig, TrainConfig
from unclip_jax.diffusion import samplers
from unclip_jax.diffusion.guidance import clip_static
from unclip_jax.diffusion.inpainting import Known, keep_known, mask_channels
from unclip_jax.diffusion.schedule import Schedule, StepTable, make_schedule, step_table, strided_timesteps
from unclip_jax.diffusion.seams import seamless_denoiser
from unclip_jax.models.clip import TextTower
from unclip_jax.stages import encode_image, to_model
from unclip_jax.types import Denoise, Keys, Params

Sampler = Literal["ddpm", "ddim", "dpm", "analytic"]
BUCKETS = (1, 2, 4, 8, 16)  # batch sizes that programs are compiled for
PRIOR, DECODER, UPSAMPLER = 1, 2, 3  # what a picture's key is folded with, so that stages draw different noise


class Text(NamedTuple):
    """A batch of encoded prompts: CLIP's states, their padding mask, and the text embedding."""

    states: Float[Array, "b n d"]
    mask: Bool[Array, "b n"]
    embedding: Float[Array, "b z"]


class Options(NamedTuple):
    """What one call of generation may change; None keeps what the cascade's configs recommend."""

    size: int | None = None
    sampler: Sampler | None = None
    steps: int | None = None  # of the decoder
    guidance: float | None = None  # of the decoder
    prior_steps: int | None = None
    prior_guidance: float | None = None
    candidates: int | None = None  # of the diffusion prior
    prior: Literal["diffusion", "ar"] = "diffusion"
    prior_temperature: float | None = None  # of the autoregressive prior
    resamples: int | None = None  # walks through every stretch of noise levels where a plain decoder inpaints
    rank_from: int = 1  # pictures made of each prompt, of which CLIP's favourite is kept
    clip_guidance: float = 0.0  # of the decoder, along the gradient of CLIP's logit of picture and prompt


RECOMMENDED = Options()


def options_of(settings: Mapping[str, Any]) -> Options:
    """The options among named settings, such as those of a command; the defaults of those that are not there."""
    return Options(**{name: settings[name] for name in Options._fields if name in settings})


def picture_keys(seed: int, count: int) -> Keys:
    """Keys of `count` pictures: picture i of seed s is the picture of seed s + i."""
    return jax.vmap(jax.random.key)(np.arange(seed, seed + count, dtype=np.uint32))


def stage_keys(keys: Keys, stage: int | Array) -> Keys:
    """Keys of one stage, so that stages draw different noise."""
    return jax.vmap(lambda key: jax.random.fold_in(key, stage))(keys)


def sampler_step(sampler: Sampler, schedule: Schedule, diffusion: DiffusionConfig, eta: Array) -> samplers.Step:
    """The sampler of a name."""
    match sampler:
        case "ddpm":
            return samplers.ddpm(schedule, "learned" if diffusion.learned_variance else "small")
        case "ddim":
            return samplers.ddim(schedule, eta)
        case "dpm":
            return samplers.dpm_solver_pp_2m(schedule)
        case "analytic":
            raise ValueError("only diffusion priors have analytic variances: choose the sampler ddpm, ddim or dpm")


def table_of(config: TrainConfig, steps: int) -> StepTable:
    """The strided walk of `steps` steps through a network's noise levels."""
    return step_table(strided_timesteps(steps, config.diffusion.steps))


def clipped(diffusion: DiffusionConfig, denoise: Denoise) -> Denoise:
    """The denoiser within the limits of its config."""
    return denoise if diffusion.clip is None else clip_static(denoise, diffusion.clip)


def per_picture(value: float, rows: int) -> Float[np.ndarray, " b"]:
    """A setting as data, one number per picture."""
    return np.full((rows,), value, np.float32)


def beside_of(network: DecoderConfig, known: Known | None) -> Float[Array, "b h w 4"] | None:
    """The further input channels of a decoder that was trained to inpaint."""
    if known is None or network.unet.in_channels == 3:
        return None
    return mask_channels(to_model(jnp.asarray(known.picture)), jnp.asarray(known.repaint))


def keeping(
    step: samplers.Step, denoise: Denoise, config: TrainConfig, known: Known | None, reach: int
) -> tuple[samplers.Step, Denoise]:
    """Sampler and denoiser that keep what is known and go on from it; reach: px of the seam's correction."""
    if known is None:
        return step, denoise
    x0, repaint = to_model(jnp.asarray(known.picture)), jnp.asarray(known.repaint)
    kept = keep_known(step, make_schedule(config.diffusion), x0, repaint[..., None])
    return kept, seamless_denoiser(denoise, x0, repaint, reach)


@partial(jax.jit, static_argnums=0)
def encode(config: TrainConfig, params: Params, tokens: Array, mask: Array) -> Text:
    """Prompts' states and embeddings; config is CLIP's, whose image tower may be absent."""
    assert isinstance(config.network, ClipConfig)
    encoding: Any = TextTower(config.network).apply({"params": params}, tokens, method="encode_text")
    return Text(encoding.states, mask, encoding.embedding)


def doubled(null: Text, text: Text) -> Text:
    """The doubled batch of classifier-free guidance: unconditional rows first."""
    return Text(*(jnp.concatenate([jnp.broadcast_to(u, c.shape), c]) for u, c in zip(null, text, strict=True)))


embed_images = partial(jax.jit, static_argnums=0)(encode_image)
"""Compiled `stages.encode_image`: (CLIP's config, parameters, uint8 [b h w 3]) -> unit-length embeddings [b z]."""
