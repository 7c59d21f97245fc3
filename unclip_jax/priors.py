"""From a caption to CLIP image embeddings: the priors' compiled sampling."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.config import ArPriorConfig, PriorConfig, SampleConfig, TrainConfig
from unclip_jax.diffusion import analytic, gaussian, samplers
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
from unclip_jax.models.ar_prior import ArPrior
from unclip_jax.models.clip import normalise
from unclip_jax.models.prior import Prior, Whitening
from unclip_jax.models.quantiser import Quantiser
from unclip_jax.offload import on_device
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
    clean_variance: Float[Array, " T"] | None = None,
) -> Float[Array, "b z"]:
    """CLIP image embeddings: of each prompt's candidates the one whose direction is closest to the text embedding's.

    clean_variance: V_t of the analytic sampler.
    """
    assert isinstance(config.network, PriorConfig)
    prior, schedule, unit_length = Prior(config.network), make_schedule(config.diffusion), config.network.unit_length
    both, width = doubled(null, text), config.network.embedding_dim
    both_text = (both.states, both.mask, both.embedding)

    def apply(x: Array, t: Array) -> Any:
        return prior.apply({"params": params}, x, t, *both_text)

    denoise = classifier_free(gaussian.denoiser(config.diffusion, schedule, apply), guidance)
    denoise = clipped(config.diffusion, denoise)
    if sampler == "analytic":
        assert clean_variance is not None
        step = samplers.ddpm(schedule, analytic.reverse_variance(schedule, clean_variance))
    else:
        step = sampler_step(sampler, schedule, config.diffusion, eta)

    def candidate(number: Array) -> Float[Array, "b z"]:
        own = stage_keys(stage_keys(keys, PRIOR), number)
        x = samplers.initial_noise(own, (width,))
        drawn = whitening.restore(samplers.run(step, denoise, own, x, table))
        return normalise(drawn) if unit_length else drawn

    drawn = jax.lax.map(candidate, jnp.arange(candidates))
    cosines = (jax.vmap(normalise)(drawn) * normalise(text.embedding)).sum(-1)
    best = jnp.argmax(cosines, axis=0)
    return jnp.take_along_axis(drawn, best[None, :, None], axis=0)[0]


@partial(jax.jit, static_argnums=0)
def sample_ar_prior(
    config: TrainConfig,
    params: Params,
    quantiser: Quantiser,
    keys: Keys,
    text: Text,
    null: Text,
    guidance: Float[Array, " b"],
    temperature: Float[Array, " b"],
) -> Float[Array, "b z"]:
    """CLIP image embeddings, unit length, drawn component by component (paper section 2.2).

    The token of z_i . z_t comes from the upper half of what training saw. temperature 0 takes the likeliest buckets.
    """
    network = config.network
    assert isinstance(network, ArPriorConfig)
    own, both = stage_keys(keys, PRIOR), doubled(null, text)
    apply: Any = partial(ArPrior(network).apply, {"params": params})

    def step(carry: tuple[Array, Any], number: Array) -> tuple[tuple[Array, Any], Array]:
        last, memory = carry
        logits, memory = apply(jnp.concatenate([last, last]), number, both.mask, memory, method="step")
        absent, present = jnp.split(logits, 2)
        logits = (absent + guidance[:, None] * (present - absent)) / jnp.maximum(temperature, 1e-6)[:, None]
        token = jax.vmap(jax.random.categorical)(stage_keys(own, number + 1), logits).astype(jnp.int32)
        return (token, memory), token

    half, full = network.dot_buckets // 2, network.dot_buckets
    dot_token = jax.vmap(lambda key: jax.random.randint(key, (), half, full, jnp.int32))(stage_keys(own, 0))
    start = dot_token, apply(*both, method="begin")
    _, tokens = jax.lax.scan(step, start, jnp.arange(network.components, dtype=jnp.int32))
    return quantiser.decode(tokens.T)


def prior_embeddings(prior: Network, keys: Keys, text: Text, null: Text, options: Options) -> Float[Array, "b z"]:
    """The image embeddings of either prior at the recommended or the chosen settings."""
    advice: SampleConfig = prior.config.sample
    guidance = advice.guidance if options.prior_guidance is None else options.prior_guidance
    if isinstance(prior.config.network, ArPriorConfig):
        temperature = advice.temperature if options.prior_temperature is None else options.prior_temperature
        return sample_ar_prior(
            prior.config, on_device(prior.params), Quantiser(**prior.constants["quantiser"]), keys, text, null,
            per_picture(guidance, len(keys)), per_picture(temperature, len(keys)),
        )  # fmt: skip
    table = table_of(prior.config, options.prior_steps or advice.steps)
    return sample_prior(
        prior.config, advice.sampler, options.candidates or advice.candidates, on_device(prior.params),
        Whitening(**prior.constants["whitening"]), keys, text, null, table, per_picture(guidance, len(keys)),
        np.float32(advice.eta), _clean_variance(prior) if advice.sampler == "analytic" else None,
    )  # fmt: skip


def _clean_variance(prior: Network) -> Float[np.ndarray, " T"]:
    """V_t of a prior's analytic sampler; ValueError where the file does not hold its statistics."""
    gamma, diffusion = prior.constants.get("analytic", {}).get("gamma"), prior.config.diffusion
    if gamma is None or gamma.shape != (diffusion.steps,):
        raise ValueError("this prior lacks the statistics of its analytic sampler: run unclip analytic on its folder")
    reach = np.inf if diffusion.clip is None else diffusion.clip
    return analytic.clean_variance(make_schedule(diffusion), gamma, reach)
