"""A diffusion prior's analytic sampler: `unclip analytic` measures its statistics and stores them in the prior's file,
`unclip evaluate prior --compare` sets it beside the small variance."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64
from tqdm import tqdm

from unclip_jax import compile_cache
from unclip_jax.cascade import load_checked, load_clip
from unclip_jax.checkpoint.safetensors import Network, save_network
from unclip_jax.config import PriorConfig, TrainConfig
from unclip_jax.data.emoji import Renderer
from unclip_jax.data.loader import scenes_of
from unclip_jax.diffusion import gaussian
from unclip_jax.diffusion.analytic import clean_variance, gamma_of, squared_error
from unclip_jax.diffusion.schedule import make_schedule, strided_timesteps
from unclip_jax.evaluate.report import Figures, Report, table
from unclip_jax.evaluate.retrieval import (
    SET,
    distinct_sets,
    embed_pictures,
    encode_captions,
    held_out_scenes,
    mean_cosine,
    top1,
)
from unclip_jax.inputs import Options, Text, clipped, picture_keys
from unclip_jax.models.prior import Prior, Whitening
from unclip_jax.priors import prior_embeddings
from unclip_jax.types import Params, PRNGKey

SHOWN = (0, 10, 100, 250, 500, 750, 900, 999)  # thousandths of the noise levels, in the table
PART = 64  # pictures that CLIP embeds at a time
COMPARED = (8, 16, 32, 64)  # steps


def analytic_to_file(options: argparse.Namespace) -> None:
    """Measures Gamma_t of prior.safetensors in a folder and writes the file back, as a whole or not at all.

    The prior's digest, and so the cascade's, changes with it. Raises ValueError or CheckpointError in one sentence.
    """
    if options.n < 1:
        raise ValueError(f"--n must be at least 1, not {options.n}")
    compile_cache.enable()
    path: Path = options.weights / "prior.safetensors"
    clip = load_clip(options.weights)
    prior = load_checked(path, PriorConfig, clip)
    gamma = measure(clip, prior, options.n, options.timesteps)
    print(table(_figures(prior.config, gamma)))
    config = prior.config
    if options.adopt:
        config = replace(config, sample=replace(config.sample, sampler="analytic"))
    digest = store(path, prior._replace(config=config), gamma)
    print(f"{path}: {prior.digest} is now {digest}, which samples by {config.sample.sampler}")


def measure(clip: Network, prior: Network, pictures: int = 512, timesteps: int = 100) -> Float64[np.ndarray, " T"]:
    """Gamma_t of a prior, told of captions and unguided, on the first training pictures of its data.

    timesteps: how many are measured, evenly strided; in between, the squared error is interpolated.
    """
    chosen = strided_timesteps(timesteps, prior.config.diffusion.steps)[::-1]
    rows = scenes_of(replace(prior.config.data, group=1))
    scenes, renderer = [rows[i] for i in range(pictures)], Renderer()
    parts = [scenes[start : start + PART] for start in range(0, pictures, PART)]
    embedding = np.concatenate([embed_pictures(clip, np.stack([renderer.render(s) for s in part])) for part in parts])
    x0 = Whitening(**prior.constants["whitening"]).whiten(jnp.asarray(embedding))
    text = encode_captions(clip, [scene.caption for scene in scenes])
    bar = tqdm(chosen, desc="measuring", unit="timestep", dynamic_ncols=True)
    errors = [float(_error(prior.config, prior.params, x0, text, t, jax.random.key(t))) for t in bar]
    return gamma_of(make_schedule(prior.config.diffusion), chosen, np.array(errors))


@partial(jax.jit, static_argnums=0)
def _error(
    config: TrainConfig, params: Params, x0: Float[Array, "b z"], text: Text, t: Array, key: PRNGKey
) -> Float[Array, ""]:
    assert isinstance(config.network, PriorConfig)
    prior, schedule = Prior(config.network), make_schedule(config.diffusion)

    def apply(x: Array, t: Array) -> Array:
        return prior.apply({"params": params}, x, t, text.states, text.mask, text.embedding)  # type: ignore[return-value]

    denoise = clipped(config.diffusion, gaussian.denoiser(config.diffusion, schedule, apply))
    noise = jax.random.normal(key, x0.shape)
    return squared_error(schedule, denoise, x0, noise, jnp.full(len(x0), t)).mean()


def store(path: Path, prior: Network, gamma: Float64[np.ndarray, " T"]) -> str:
    """Writes a prior with its statistics, its parameters in the dtype that they have, and returns its digest."""
    dtype = jax.tree.leaves(prior.params)[0].dtype.name
    constants = {**prior.constants, "analytic": {"gamma": gamma}}
    return save_network(
        path, prior.config, prior.params, constants=constants, dtype=dtype, clip=prior.clip, extra=prior.extra
    )


def _figures(config: TrainConfig, gamma: Float64[np.ndarray, " T"]) -> Figures:
    schedule = make_schedule(config.diffusion)
    clean = clean_variance(schedule, gamma)
    error = (1 - gamma) * schedule.one_minus_alphas_cumprod / schedule.alphas_cumprod
    return {
        f"t = {t}": {"abar": float(schedule.alphas_cumprod[t]), "squared error": error[t], "within bounds": clean[t]}
        for t in sorted({share * (schedule.steps - 1) // 999 for share in SHOWN})
    }


def compare_samplers(clip: Network, prior: Network, sets: int, seed: int, options: Options) -> Report:
    """The small and the analytic variance at 8, 16, 32 and 64 steps, on sets of 64 held-out captions.

    top 1, cosine: of the prior's embedding, as evaluate prior has them. spread: the total variance of the embeddings
    made over that of the true ones, which is 1 for samples of the true distribution.
    """
    chosen = distinct_sets(held_out_scenes(clip.config, clip.extra.get("concepts", ())), sets)
    null, renderer = encode_captions(clip, [""]), Renderer()
    true = np.stack([embed_pictures(clip, np.stack([renderer.render(s) for s in scenes])) for scenes in chosen])
    texts = [encode_captions(clip, [scene.caption for scene in scenes]) for scenes in chosen]
    keys = [picture_keys(seed + number * SET, SET) for number in range(sets)]
    figures: Figures = {}
    for steps in tqdm(COMPARED, desc="sampling", unit="step count", dynamic_ncols=True):
        for name, sampler in (("small", "ddpm"), ("analytic", "analytic")):
            sample = replace(prior.config.sample, sampler=sampler)
            variant = prior._replace(config=replace(prior.config, sample=sample))
            counted = options._replace(prior_steps=steps)
            rows = [prior_embeddings(variant, *given, null, counted) for given in zip(keys, texts, strict=True)]
            made = np.stack([np.asarray(row) for row in rows])
            spread = made.reshape(-1, made.shape[-1]).var(0).sum() / true.reshape(-1, true.shape[-1]).var(0).sum()
            figures[f"{steps} steps, {name}"] = {
                "top 1": top1(made, true),
                "cosine": mean_cosine(made, true),
                "spread": float(spread),
            }
    return Report(figures | {"chance": {"top 1": 1 / SET}})
