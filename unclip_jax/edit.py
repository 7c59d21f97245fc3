"""Every edit that needs no mask (paper section 3): variations, interpolations, text diffs and probes of CLIP's space.

A picture is a pair: its CLIP embedding z_i, what a caption could say of it, and x_T, all the rest, which DDIM inversion
finds. The decoder draws the picture again from both; an edit changes one of them and hands over to generate's tail.
Inversion runs without guidance, with which it is not exact, and so by default does drawing.

Pictures come in at any size, uint8 [h w 3] (`pictures.read_picture`), and are cut square around their middle. Captions
are optional: an empty one is dropped, as in training. Every function takes generate's Options (of which it reads size,
steps, guidance, and the prior's where prompts are interpolated) and raises ValueError for those that make no sense.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from unclip_jax.cascade import Cascade
from unclip_jax.config import ClipConfig, DecoderConfig, TrainConfig
from unclip_jax.data.embeddings import unit
from unclip_jax.diffusion import samplers
from unclip_jax.diffusion.guidance import limit_noise
from unclip_jax.diffusion.schedule import StepTable, make_schedule, reverse_table, strided_timesteps
from unclip_jax.generate import check, check_seeds, encode_prompts, finish, guided_decoder, null_text
from unclip_jax.inputs import (
    BUCKETS,
    DECODER,
    RECOMMENDED,
    Options,
    Sampler,
    Text,
    embed_images,
    picture_keys,
    sampler_step,
    stage_keys,
    table_of,
)
from unclip_jax.offload import on_device
from unclip_jax.pictures import square
from unclip_jax.priors import prior_embeddings
from unclip_jax.stages import to_model
from unclip_jax.types import Denoise, Keys, Params

STEPS = 50  # up and down again: 42 dB on held-out renders
MOST = 256  # pictures or frames of one edit
Progress = Callable[[str], None]
Picture = UInt8[np.ndarray, "_ _ 3"]


class Basis(NamedTuple):
    """Principal components of CLIP's image embeddings: mean [z], and orthonormal columns [z k] by falling variance."""

    mean: Float[np.ndarray, " z"]
    components: Float[np.ndarray, "z k"]


class Latent(NamedTuple):
    """Pictures as the decoder has them, a row each: z_i, x_T, and the caption; `told` is false where it is dropped."""

    embedding: Float[np.ndarray, "b z"]
    noise: Float[np.ndarray, "b h w 3"]
    text: Text
    told: Bool[np.ndarray, " b"]

    def rows(self, places: Sequence[int] | Int[np.ndarray, " n"]) -> "Latent":
        """These rows, in this order, any of them more than once."""
        return jax.tree.map(lambda leaf: np.asarray(leaf)[np.asarray(places)], self)


def variations(
    cascade: Cascade,
    picture: Picture,
    n: int = 4,
    eta: float = 1.0,
    prompt: str = "",
    seed: int = 0,
    options: Options = RECOMMENDED,
    progress: Progress = lambda stage: None,
) -> UInt8[np.ndarray, "n s s 3"]:
    """Pictures that share a picture's meaning, variation i of seed + i; eta 0 draws the picture itself, 1 is freest.

    At eta 1 an `ancestral` cascade inverts nothing: noise is fresh, settings are its own. So are Karlo's variations.
    """
    _check(cascade, options, n, seed, n)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie between 0, which reconstructs, and 1, not {eta}")
    keys = picture_keys(seed, n)
    if eta < 1 or not cascade.ancestral:
        latent = invert_pictures(cascade, [picture], [prompt], options, progress)
        return draw(cascade, keys, latent.rows([0] * n), options, progress, eta)
    progress("CLIP")
    embedding = np.repeat(embed_pictures(cascade, [picture]), n, axis=0)
    latent = Latent(embedding, _noise(cascade, keys), *_captions(cascade, [prompt] * n))
    options = options._replace(steps=options.steps or cascade.decoder.config.sample.steps)
    return draw(cascade, keys, latent, options, progress, eta, inverted=False, sampler="ddpm")


def interpolate(
    cascade: Cascade,
    ends: Sequence[Picture] | Sequence[str],
    frames: int = 8,
    seed: int = 0,
    options: Options = RECOMMENDED,
    progress: Progress = lambda stage: None,
) -> UInt8[np.ndarray, "n s s 3"]:
    """Frames on the way through two or more pictures, or prompts, evenly spaced from the first to the last.

    Pictures: slerp of z_i and of the inverted x_T, so that both ends are reconstructions. Prompts: slerp of the prior's
    z_i at one x_T, that of the seed.
    """
    _check(cascade, options, frames, seed, 1)
    if len(ends) < 2:
        raise ValueError("an interpolation needs two or more pictures, or prompts")
    if frames < len(ends):
        raise ValueError(f"{frames} frames cannot pass through {len(ends)} pictures: ask for more")
    prompts = all(isinstance(end, str) for end in ends)
    if prompts:
        latent = _prompt_latents(cascade, [str(end) for end in ends], seed, options, progress)
    else:
        latent = invert_pictures(cascade, [np.asarray(end) for end in ends], [""] * len(ends), options, progress)
    way = np.linspace(0, len(ends) - 1, frames)
    last = np.minimum(way.astype(int), len(ends) - 2)
    a, b, share = latent.rows(last), latent.rows(last + 1), way - last
    between = a._replace(embedding=slerp(a.embedding, b.embedding, share), noise=slerp(a.noise, b.noise, share))
    return draw(cascade, _one_key(seed, frames), between, options, progress, inverted=not prompts)


def text_diff(
    cascade: Cascade,
    picture: Picture,
    old: str,
    new: str,
    theta: float = 0.5,
    frames: int = 8,
    seed: int = 0,
    options: Options = RECOMMENDED,
    progress: Progress = lambda stage: None,
) -> UInt8[np.ndarray, "n s s 3"]:
    """Frames from a picture that `old` describes towards one that `new` does, at the picture's own x_T.

    z_d = normalise(z_t(new) - z_t(old)), and frame k decodes slerp(z_i, z_d, theta_k), theta_k from 0, a
    reconstruction, to `theta`; paper section 3.3 ends between 0.25 and 0.5. The decoder reads the captions too, the
    old one fading into the new. An empty `old` is left out of z_d, and then the decoder reads neither. One frame is
    the last.
    """
    _check(cascade, options, frames, seed, 1)
    if not 0 <= theta <= 1:
        raise ValueError(f"theta must lie between 0, the picture itself, and 1, not {theta}")
    direction = difference(cascade, old, new)
    latent = invert_pictures(cascade, [picture], [old], options, progress)
    share = (theta > 0) * (np.linspace(0, 1, frames) if frames > 1 else np.ones(1))
    frame = move(latent.rows([0] * frames), direction, encode_prompts(cascade, [new]), theta * share, share)
    return draw(cascade, _one_key(seed, frames), frame, options, progress)


def probe(
    cascade: Cascade,
    picture: Picture,
    components: Sequence[int],
    basis: Basis | None = None,
    seed: int = 0,
    options: Options = RECOMMENDED,
    progress: Progress = lambda stage: None,
) -> UInt8[np.ndarray, "n s s 3"]:
    """What the first k components of a picture's embedding hold, for each k of `components`, at the seed's x_T.

    basis: by default that of the cascade's autoregressive prior, else fitted (`embedding_basis`). Paper section 4.
    """
    _check(cascade, options, len(components), seed, 1)
    basis = basis or embedding_basis(cascade)
    if not all(1 <= k <= basis.components.shape[1] for k in components):
        raise ValueError(f"components must lie between 1 and {basis.components.shape[1]}, not {list(components)}")
    progress("CLIP")
    embedding = embed_pictures(cascade, [picture])[0]
    coefficients = (embedding - basis.mean) @ basis.components
    rebuilt = np.stack([basis.mean + basis.components[:, :k] @ coefficients[:k] for k in components])
    keys, rows = _one_key(seed, len(components)), len(components)
    unit_length = cascade.clip.config.network.unit_length  # type: ignore[union-attr]
    latent = Latent(unit(rebuilt) if unit_length else rebuilt, _noise(cascade, keys), *_captions(cascade, [""] * rows))
    return draw(cascade, keys, latent, options, progress, inverted=False)


def slerp(
    a: Float[np.ndarray, "b *d"], b: Float[np.ndarray, "b *d"], share: Float[np.ndarray, " b"]
) -> Float[np.ndarray, "b *d"]:
    """Spherical interpolation row by row, float32: share 0 gives a, 1 gives b, and rows of equal norm keep it."""
    one, other = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    angle = np.arccos(np.clip((unit(one) * unit(other)).sum(1), -1, 1))[:, None]
    share = np.asarray(share, np.float64)[:, None]
    flat = np.sin(angle) < 1e-6  # parallel: there is no arc, or no single one
    sine = np.where(flat, 1, np.sin(angle))
    left = np.where(flat, 1 - share, np.sin((1 - share) * angle) / sine)
    right = np.where(flat, share, np.sin(share * angle) / sine)
    return (left * one + right * other).reshape(a.shape).astype(np.float32)


def move(
    latent: Latent,
    direction: Float[np.ndarray, "*#b z"],
    text: Text,
    theta: Float[np.ndarray, " b"],
    share: Float[np.ndarray, " b"],
) -> Latent:
    """Latents after a text diff: z_i turned by theta towards z_d, and `share` of the way to other captions.

    direction, text: for each latent, or one for all.
    """
    length = np.linalg.norm(latent.embedding, axis=-1, keepdims=True)
    embedding = slerp(latent.embedding, length * direction, theta)

    def mixed(old: Any, new: Any) -> np.ndarray:
        weight = share.reshape(-1, *[1] * (np.ndim(old) - 1)).astype(np.float32)
        return (1 - weight) * np.asarray(old) + weight * np.asarray(new)

    old, read = latent.text, share[:, None]
    mask = np.asarray(old.mask) & (read < 1) | np.asarray(text.mask) & (read > 0)
    faded: Any = (mixed(old.states, text.states), mask, mixed(old.embedding, text.embedding))
    return latent._replace(embedding=embedding, text=Text(*faded))


def difference(cascade: Cascade, old: str, new: str) -> Float[np.ndarray, " z"]:
    """The text diff vector z_d of unit length; ValueError where both captions are the same to CLIP."""
    before, after = unit(np.asarray(encode_prompts(cascade, [old, new]).embedding))
    between = after - before if old else after
    if np.linalg.norm(between) < 1e-4:
        raise ValueError("both captions say the same to CLIP: there is no difference to draw")
    return unit(between[None])[0]


def embedding_basis(cascade: Cascade, pictures: int = 2048) -> Basis:
    """The autoregressive prior's principal components, else those of so many training scenes.

    Raises ModuleNotFoundError in one sentence where scenes must be drawn and the train extra is not installed.
    """
    if cascade.ar_prior is not None:
        quantiser = cascade.ar_prior.constants["quantiser"]
        return Basis(np.asarray(quantiser["mean"]), np.asarray(quantiser["components"]))
    from unclip_jax.data.emoji import Renderer, Scenes

    scenes, renderer = Scenes(tuple(cascade.clip.extra.get("concepts", ()))), Renderer()
    embeddings = embed_pictures(cascade, [renderer.render(scenes[i]) for i in range(pictures)]).astype(np.float64)
    mean = embeddings.mean(0)
    _, _, rows = np.linalg.svd(embeddings - mean, full_matrices=False)
    return Basis(mean.astype(np.float32), rows.T.astype(np.float32))


def invert_pictures(
    cascade: Cascade,
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    options: Options = RECOMMENDED,
    progress: Progress = lambda stage: None,
) -> Latent:
    """The pairs (z_i, x_T) of pictures, told of their captions where these are not empty."""
    progress("inversion")
    config = cascade.decoder.config
    assert isinstance(config.network, DecoderConfig)
    small = np.stack([square(picture, config.network.size) for picture in pictures])
    table = reverse_table(strided_timesteps(options.steps or STEPS, config.diffusion.steps))
    text, told = _captions(cascade, prompts)
    embedding = embed_pictures(cascade, pictures)
    up = partial(invert, config, on_device(cascade.decoder.params), table)
    return Latent(embedding, _in_buckets(up, small, embedding, text, told), text, told)


def draw(
    cascade: Cascade,
    keys: Keys,
    latent: Latent,
    options: Options = RECOMMENDED,
    progress: Progress = lambda stage: None,
    eta: float = 0.0,
    inverted: bool = True,
    sampler: Sampler = "ddim",
) -> UInt8[np.ndarray, "b s s 3"]:
    """The tail of every edit: pictures of latents at the chosen size.

    inverted: x_T was found, not drawn: guidance is 1 unless the options say otherwise, not the cascade's recommended.
    """
    config = cascade.decoder.config
    progress(f"decoder {cascade.sizes[0]} px")
    guidance = (1.0 if inverted else config.sample.guidance) if options.guidance is None else options.guidance
    settings = None if guidance == 1 else np.float32(guidance), np.float32(eta), np.float32(inverted * (1 - eta))
    given = table_of(config, options.steps or STEPS), null_text(cascade), *settings
    small = _in_buckets(partial(redraw, config, sampler, on_device(cascade.decoder.params), *given), keys, latent)
    return finish(cascade, keys, small, check(cascade, options), progress)


def embed_pictures(cascade: Cascade, pictures: Sequence[Picture]) -> Float[np.ndarray, "b z"]:
    """CLIP's embeddings of pictures of any size, as the decoder reads them."""
    cascade.require_image_tower()
    config = cascade.clip.config.network
    assert isinstance(config, ClipConfig)
    return _in_buckets(
        partial(embed_images, config, on_device(cascade.clip.params)),
        np.stack([square(picture, config.image_size) for picture in pictures]),
    )


@partial(jax.jit, static_argnums=0)
def invert(
    config: TrainConfig,
    params: Params,
    table: StepTable,
    picture: UInt8[Array, "b h w 3"],
    embedding: Float[Array, "b z"],
    text: Text,
    told: Bool[Array, " b"],
) -> Float[Array, "b h w 3"]:
    """x_T of pictures at the decoder's size, by DDIM inversion without guidance; table: a reverse_table."""
    denoise = _denoiser(config, params, embedding, text, told, None, jnp.ones(()))
    keys = picture_keys(0, len(picture))  # of no consequence: inversion draws no noise
    return samplers.invert(make_schedule(config.diffusion), denoise, keys, to_model(picture), table)


@partial(jax.jit, static_argnums=(0, 1))
def redraw(
    config: TrainConfig,
    sampler: Sampler,
    params: Params,
    table: StepTable,
    null: Text | None,
    guidance: Float[Array, ""] | None,
    eta: Float[Array, ""],
    limit: Float[Array, ""],
    keys: Keys,
    latent: Latent,
) -> Float[Array, "b h w 3"]:
    """Pictures in [-1, 1] at the decoder's size; DDIM without guidance, at eta 0 and limit 1, undoes `invert`.

    limit: share of guidance.limit_noise, 0 where x_T is noise.
    """
    scale = None if guidance is None else jnp.broadcast_to(guidance, (len(keys),))
    embedding, noise, text, told = jax.tree.map(jnp.asarray, latent)
    denoise = _denoiser(config, params, embedding, text, told, scale, limit, null)
    step = sampler_step(sampler, make_schedule(config.diffusion), config.diffusion, eta)
    return jnp.clip(samplers.run(step, denoise, stage_keys(keys, DECODER), noise, table), -1, 1)


def _denoiser(
    config: TrainConfig,
    params: Params,
    embedding: Array,
    text: Text,
    told: Array,
    guidance: Array | None,
    share: Array,
    null: Text | None = None,
) -> Denoise:
    denoise = guided_decoder(config, params, embedding, text, guidance, jnp.zeros(()), told, null=null)
    return limit_noise(make_schedule(config.diffusion), denoise, share)


def _prompt_latents(
    cascade: Cascade, prompts: Sequence[str], seed: int, options: Options, progress: Progress
) -> Latent:
    progress("prior")
    prior, keys = cascade.chosen_prior(options.prior), _one_key(seed, len(prompts))
    text, null = encode_prompts(cascade, prompts), encode_prompts(cascade, [""])
    embedding = _in_buckets(lambda k, t: prior_embeddings(prior, k, t, null, options), keys, text)
    return Latent(embedding, _noise(cascade, keys), *_captions(cascade, [""] * len(prompts)))


def _in_buckets(function: Callable[..., Any], *rows: Any) -> np.ndarray:
    """function of the rows, in batches of the sizes that programs are compiled for."""
    count, done = len(jax.tree.leaves(rows)[0]), []
    for start in range(0, count, BUCKETS[-1]):
        size = min(count - start, BUCKETS[-1])
        bucket = next(bucket for bucket in BUCKETS if bucket >= size)
        places = start + np.minimum(np.arange(bucket), size - 1)
        done.append(np.asarray(function(*jax.tree.map(lambda leaf, places=places: leaf[places], rows)))[:size])
    return np.concatenate(done)


def _captions(cascade: Cascade, prompts: Sequence[str]) -> tuple[Text, Bool[np.ndarray, " b"]]:
    return encode_prompts(cascade, prompts), np.array([bool(prompt) for prompt in prompts])


def _one_key(seed: int, count: int) -> Keys:
    """The same key for every frame, so that frames differ by nothing else."""
    return picture_keys(seed, 1)[np.zeros(count, int)]


def _noise(cascade: Cascade, keys: Keys) -> Float[np.ndarray, "b h w 3"]:
    side = cascade.sizes[0]
    return np.asarray(samplers.initial_noise(stage_keys(keys, DECODER), (side, side, 3)))


def _check(cascade: Cascade, options: Options, pictures: int, seed: int, seeds: int) -> None:
    """ValueError where something asked for makes no sense."""
    if not 1 <= pictures <= MOST:
        raise ValueError(f"an edit makes between 1 and {MOST} pictures, not {pictures}")
    check_seeds(seed, seed + seeds - 1)
    check(cascade, options)
