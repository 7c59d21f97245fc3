"""From a caption to CLIP image embeddings: the priors' compiled sampling."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.config import PriorConfig, SampleConfig, TrainConfig
from unclip_jax.diffusion import gaussian, samplers
from unclip_jax.diffusion.guidance import classifier_free
from unclip_jax.diffusion.schedule import StepTable, make_schedule
from unclip_jax.inputs import (
    PRIOR,
    Options,
    Sampler,
    Text,
    clipped,
    doubled,
    per_picture,
    sampler_step,
    stage_keys,
    table_of,
)
from unclip_jax.models.clip import normalise
from unclip_jax.models.prior import Prior, Whitening
from unclip_jax.types import Keys, Params


@partial(jax.jit, static_argnums=(0, 1, 2))
def sample_prior(
    config: TrainConfig,
    sampler: Sampler,
    candidates: int,
    params: Params,
    whitening: Whitening,
    keys: Keys,
    text: Text,
    null: Text,
    table: StepTable,
    guidance: Float[Array, " b"],
    eta: Float[Array, ""],
) -> Float[Array, "b z"]:
    """CLIP image embeddings, unit length: of each prompt's candidates the one with the largest z_i . z_t."""
    assert isinstance(config.network, PriorConfig)
    prior, schedule = Prior(config.network), make_schedule(config.diffusion)
    both, width = doubled(null, text), config.network.embedding_dim
    both_text = (both.states, both.mask, both.embedding)

    def apply(x: Array, t: Array) -> Any:
        return prior.apply({"params": params}, x, t, *both_text)

    denoise = classifier_free(gaussian.denoiser(config.diffusion, schedule, apply), guidance)
    denoise = clipped(config.diffusion, denoise)
    step = sampler_step(sampler, schedule, config.diffusion, eta)

    def candidate(number: Array) -> Float[Array, "b z"]:
        own = stage_keys(stage_keys(keys, PRIOR), number)
        x = samplers.initial_noise(own, (width,))
        return normalise(whitening.restore(samplers.run(step, denoise, own, x, table)))

    drawn = jax.lax.map(candidate, jnp.arange(candidates))
    best = jnp.argmax(jnp.einsum("cbz,bz->cb", drawn, normalise(text.embedding)), axis=0)
    return jnp.take_along_axis(drawn, best[None, :, None], axis=0)[0]


def prior_embeddings(prior: Network, keys: Keys, text: Text, null: Text, options: Options) -> Float[Array, "b z"]:
    """The prior's image embeddings at the recommended or the chosen settings."""
    advice: SampleConfig = prior.config.sample
    guidance = advice.guidance if options.prior_guidance is None else options.prior_guidance
    return sample_prior(
        prior.config, advice.sampler, options.candidates, prior.params, Whitening(**prior.constants["whitening"]),
        keys, text, null, table_of(prior.config, options.prior_steps or advice.steps), per_picture(guidance, len(keys)),
        np.float32(advice.eta),
    )  # fmt: skip
