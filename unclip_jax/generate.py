"""From a prompt to pixels: the loaded cascade and the four steps that it runs one after another.

    encode        tokens -> CLIP text states and embedding
    sample_prior  text -> CLIP image embedding; of several candidates the one closest to the text embedding
    decode        image embedding and text -> 64 px picture
    upsample      small picture -> 256 px -> 1024 px

Between stages pictures are floats in [-1, 1], as a published cascade was trained to hand them over; `finish` alone
rounds to bytes.

Parameters are arguments of the compiled functions, and so are guidance, step tables and seeds: another prompt, scale or
number of steps is other data and no other program.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from unclip_jax.cascade import SHIPPED, Cascade
from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.config import ClipConfig, DecoderConfig, SampleConfig, TrainConfig, UpsamplerConfig
from unclip_jax.diffusion import gaussian, samplers
from unclip_jax.diffusion.guidance import classifier_free, score_guided
from unclip_jax.diffusion.inpainting import Known, resampled
from unclip_jax.diffusion.schedule import StepTable, make_schedule
from unclip_jax.inputs import (
    BUCKETS,
    DECODER,
    RECOMMENDED,
    UPSAMPLER,
    Options,
    Sampler,
    Text,
    beside_of,
    clipped,
    doubled,
    encode,
    keeping,
    per_picture,
    picture_keys,
    sampler_step,
    stage_keys,
    table_of,
)
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.upsampler import Upsampler, resize_low
from unclip_jax.offload import on_device
from unclip_jax.priors import prior_embeddings
from unclip_jax.rank import Candidates, ClipGuidance, candidate_keys, chosen, clip_scores, picture_score
from unclip_jax.sharding import row_ways
from unclip_jax.stages import to_model, to_pixels
from unclip_jax.types import Denoise, Keys, Params

FINE_SEAM = 8  # px that the correction of a seam reaches at an upsampler's size; a decoder's reaches everywhere
JUMP, RESAMPLES = 0.1, 5  # share of the steps that make a stretch, and how often each is walked, without training


def guided_decoder(
    config: TrainConfig,
    params: Params,
    embedding: Float[Array, "b z"],
    text: Text,
    guidance: Float[Array, " b"] | None,
    rescale: Float[Array, ""],
    keep_text: Bool[Array, " b"] | None = None,
    beside: Float[Array, "b h w e"] | None = None,
    null: Text | None = None,
) -> Denoise:
    """The decoder as a denoiser in [-1, 1], told of an embedding and a caption, guided and clipped.

    guidance None: 1, at half the cost. keep_text: false where a caption is dropped, as in training; None: all are kept.
    beside: further input channels. null: the empty caption, where the decoder is guided with it (empty_null_text), and
    where a caption that is dropped must be the empty one itself.
    """
    assert isinstance(config.network, DecoderConfig)
    decoder, passes = Decoder(config.network), 1 if guidance is None else 2
    both = text if guidance is None else doubled(null or text, text)
    keep = jnp.arange(passes * len(embedding)) >= (passes - 1) * len(embedding)
    keep_both = keep if keep_text is None else keep & jnp.concatenate([keep_text] * passes)
    if config.network.empty_null_text:
        keep_both = jnp.ones_like(keep)
    told = decoder.apply(
        {"params": params}, jnp.concatenate([embedding] * passes), *both, keep, keep_both, method="condition"
    )

    def apply(x: Array, t: Array) -> Any:
        x = x if beside is None else jnp.concatenate([x, jnp.concatenate([beside] * passes)], axis=-1)
        return decoder.apply({"params": params}, x, t, told)

    denoise = gaussian.denoiser(config.diffusion, make_schedule(config.diffusion), apply)
    return clipped(config.diffusion, denoise if guidance is None else classifier_free(denoise, guidance, rescale))


@partial(jax.jit, static_argnums=(0, 1), static_argnames=("clip",))
def decode(
    config: TrainConfig,
    sampler: Sampler,
    params: Params,
    keys: Keys,
    embedding: Float[Array, "b z"],
    text: Text,
    table: StepTable,
    guidance: Float[Array, " b"],
    rescale: Float[Array, ""],
    eta: Float[Array, ""],
    start: Float[Array, "b h w 3"] | None = None,
    known: Known | None = None,
    clip: ClipConfig | None = None,
    clip_guidance: ClipGuidance | None = None,
    null: Text | None = None,
) -> Float[Array, "b h w 3"]:
    """Pictures in [-1, 1] at the decoder's size from embeddings and captions; start is x_T, None: noise of the keys."""
    assert isinstance(config.network, DecoderConfig)
    beside = beside_of(config.network, known)
    denoise = guided_decoder(config, params, embedding, text, guidance, rescale, beside=beside, null=null)
    if clip is not None and clip_guidance is not None:
        score = picture_score(clip, clip_guidance.params, text.embedding)
        pulled = score_guided(make_schedule(config.diffusion), denoise, score, clip_guidance.scale)
        denoise = clipped(config.diffusion, pulled)
    own, side = stage_keys(keys, DECODER), config.network.size
    x = samplers.initial_noise(own, (side, side, 3)) if start is None else start
    step = sampler_step(sampler, make_schedule(config.diffusion), config.diffusion, eta)
    step, denoise = keeping(step, denoise, config, known, side)
    return jnp.clip(samplers.run(step, denoise, own, x, table), -1, 1)


@partial(jax.jit, static_argnums=(0, 1))
def upsample(
    config: TrainConfig,
    sampler: Sampler,
    params: Params,
    keys: Keys,
    low: Float[Array, "b k k 3"] | UInt8[Array, "b k k 3"],
    table: StepTable,
    eta: Float[Array, ""],
    known: Known | None = None,
) -> Float[Array, "b h w 3"]:
    """Pictures in [-1, 1] at the upsampler's size, from smaller ones in [-1, 1] or in bytes."""
    assert isinstance(config.network, UpsamplerConfig)
    upsampler, schedule = Upsampler(config.network), make_schedule(config.diffusion)
    size = config.network.size
    resized = resize_low(to_model(low) if low.dtype == jnp.uint8 else low, size)

    def apply(x: Array, t: Array) -> Any:
        return upsampler.apply({"params": params}, x, t, resized)

    denoise = clipped(config.diffusion, gaussian.denoiser(config.diffusion, schedule, apply))
    own = stage_keys(keys, UPSAMPLER + size)
    x = samplers.initial_noise(own, (size, size, 3))
    step = sampler_step(sampler, schedule, config.diffusion, eta)
    step, denoise = keeping(step, denoise, config, known, FINE_SEAM)
    return jnp.clip(samplers.run(step, denoise, own, x, table), -1, 1)


def check(cascade: Cascade, options: Options) -> int:
    """The output size; ValueError in one sentence where an option makes no sense."""
    size = cascade.sizes[-1] if options.size is None else options.size
    if size not in cascade.sizes:
        known = ", ".join(map(str, cascade.sizes))
        raise ValueError(f"this cascade makes pictures of {known} px, not {size}{_offer(cascade, size)}")
    # Edits of pictures need no diffusion prior, and Karlo's image variations have none.
    without = options.prior == "diffusion" and cascade.prior is None
    prior = cascade.decoder if without else cascade.chosen_prior(options.prior)
    if options.prior == "ar" and options.prior_steps is not None:
        raise ValueError("the autoregressive prior has no steps to choose: leave prior steps out")
    if options.prior == "diffusion" and options.prior_temperature is not None:
        raise ValueError("the diffusion prior has no temperature: choose the prior ar, or leave it out")
    for name, steps, config in (
        ("steps", options.steps, cascade.decoder.config),
        ("prior steps", options.prior_steps, prior.config),
    ):
        if steps is not None and not 1 <= steps <= config.diffusion.steps:
            raise ValueError(f"{name} must lie between 1 and {config.diffusion.steps}, not {steps}")
    for name, scale in (
        ("guidance", options.guidance),
        ("prior guidance", options.prior_guidance),
        ("prior temperature", options.prior_temperature),
        ("clip guidance", options.clip_guidance),
    ):
        if scale is not None and not (np.isfinite(scale) and 0 <= scale <= 100):
            raise ValueError(f"{name} must be a number between 0 and 100, not {scale}")
    if options.candidates is not None and not 1 <= options.candidates <= 64:
        raise ValueError(f"candidates must lie between 1 and 64, not {options.candidates}")
    if not 1 <= options.rank_from <= 512:
        raise ValueError(f"rank from must lie between 1 and 512, not {options.rank_from}")
    if options.rank_from > 1 or options.clip_guidance:
        cascade.require_image_tower()
    return size


def _offer(cascade: Cascade, size: int) -> str:
    """How a cascade that ends at a smaller size gets to this one, where an upsampler that ships is made for that."""
    path = SHIPPED / f"upsampler_{size}.safetensors"
    if size != 4 * cascade.sizes[-1] or not path.exists():
        return ""
    return f": --upsampler '{path}' (load_cascade's upsampler) appends the stage that enlarges {size // 4} px to {size}"


def check_seeds(first: int, last: int) -> None:
    """ValueError where the seeds from first to last are not all 32-bit numbers."""
    if first < 0 or last >= 2**32:
        raise ValueError(f"seeds must lie between 0 and {2**32 - 1}, not {first if first < 0 else last}")


def generate(
    cascade: Cascade,
    prompts: Sequence[str] | str,
    seeds: Sequence[int] | int = 0,
    options: Options = RECOMMENDED,
    progress: Callable[[str], None] = lambda stage: None,
    known: Known | None = None,
) -> UInt8[np.ndarray, "b h w 3"]:
    """Pictures of prompts, uint8 [b size size 3].

    seeds: one per prompt, or the first of consecutive ones. progress: called with a stage's name as it begins, by
    upsamplers for every picture. known: of that size, one per prompt, what stays of them at every stage. Raises
    ValueError for options that make no sense.
    """
    return generate_ranked(cascade, prompts, seeds, options, progress, known)[0]


def generate_ranked(
    cascade: Cascade,
    prompts: Sequence[str] | str,
    seeds: Sequence[int] | int = 0,
    options: Options = RECOMMENDED,
    progress: Callable[[str], None] = lambda stage: None,
    known: Known | None = None,
) -> tuple[UInt8[np.ndarray, "b h w 3"], Float[np.ndarray, "b n"] | None]:
    """As generate, and CLIP's scores of all candidates, of which the highest was kept; None where n is 1."""
    size = check(cascade, options)
    cascade.chosen_prior(options.prior)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = list(range(seeds, seeds + len(prompts)) if isinstance(seeds, int) else seeds)
    if not prompts or len(seeds) != len(prompts):
        raise ValueError(f"pictures need a prompt and a seed each, not {len(prompts)} prompts and {len(seeds)} seeds")
    check_seeds(min(seeds), max(seeds))
    pictures, scores = [], []
    for start in range(0, len(prompts), BUCKETS[-1]):
        part = slice(start, start + BUCKETS[-1])
        kept = None if known is None else known.rows(part)
        drawn = draw_candidates(cascade, prompts[part], seeds[part], options, progress, kept)
        best, keys = chosen(drawn)
        pictures.append(finish(cascade, keys, best, size, progress, kept))
        scores.append(drawn.scores)
    return np.concatenate(pictures), None if options.rank_from == 1 else np.concatenate(scores)


def draw_candidates(
    cascade: Cascade,
    prompts: Sequence[str],
    seeds: Sequence[int],
    options: Options,
    progress: Callable[[str], None] = lambda stage: None,
    known: Known | None = None,
) -> Candidates:
    """options.rank_from pictures of every prompt at the decoder's size, drawn and scored a bucket at a time."""
    count = options.rank_from
    keys = candidate_keys(jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32)), count).reshape(-1)
    pictures, scores = [], []
    for start in range(0, len(keys), BUCKETS[-1]):
        own = keys[start : start + BUCKETS[-1]]
        of = (start + np.arange(len(own))) // count
        kept = None if known is None else Known(known.picture[of], known.repaint[of])
        drawn, liked = _draw_batch(cascade, [prompts[i] for i in of.tolist()], own, options, progress, kept)
        pictures.append(drawn)
        scores.append(liked)
    shape = len(prompts), count
    return Candidates(
        np.concatenate(pictures).reshape(*shape, *pictures[0].shape[1:]),
        keys.reshape(shape),
        None if count == 1 else np.concatenate(scores).reshape(shape),
    )


def _draw_batch(
    cascade: Cascade,
    prompts: list[str],
    keys: Keys,
    options: Options,
    progress: Callable[[str], None],
    known: Known | None,
) -> tuple[Float[np.ndarray, "b h w 3"], Float[np.ndarray, " b"]]:
    count = len(prompts)
    padding = next(bucket for bucket in BUCKETS if bucket >= count) - count
    keys = jnp.concatenate([keys, picture_keys(0, padding)])
    progress("text")
    text, null = encode_prompts(cascade, [*prompts, *[""] * padding]), encode_prompts(cascade, [""])
    progress("prior")
    # Each stage is awaited, so that progress names the one at work.
    embedding = jax.block_until_ready(prior_embeddings(cascade.chosen_prior(options.prior), keys, text, null, options))
    progress(f"decoder {cascade.sizes[0]} px")
    pictures = jax.block_until_ready(decode_embeddings(cascade, keys, embedding, text, options, known))
    if options.rank_from == 1:
        return np.asarray(pictures)[:count], np.zeros(count, np.float32)
    scores = clip_scores(cascade.clip.config, on_device(cascade.clip.params), to_pixels(pictures), text.embedding)
    return np.asarray(pictures)[:count], np.asarray(scores)[:count]


def encode_prompts(cascade: Cascade, prompts: Sequence[str]) -> Text:
    """Prompts through the cascade's tokenizer and text tower."""
    tokens = cascade.tokenizer.encode(list(prompts))
    return jax.block_until_ready(encode(cascade.clip.config, on_device(cascade.clip.params), tokens.ids, tokens.mask))


def null_text(cascade: Cascade) -> Text | None:
    """The empty caption where the decoder is guided with it, else None."""
    decoder = cascade.decoder.config.network
    assert isinstance(decoder, DecoderConfig)
    return encode_prompts(cascade, [""]) if decoder.empty_null_text else None


def decode_embeddings(
    cascade: Cascade,
    keys: Keys,
    embedding: Float[Array, "b z"],
    text: Text,
    options: Options,
    known: Known | None = None,
) -> Float[Array, "b h w 3"]:
    """The decoder's pictures in [-1, 1] at recommended or chosen settings; of `known`, at any size, a part stays."""
    network = cascade.decoder
    advice: SampleConfig = network.config.sample
    guidance = advice.guidance if options.guidance is None else options.guidance
    table = table_of(network.config, options.steps or advice.steps)
    if known is not None:
        decoder = network.config.network
        assert isinstance(decoder, DecoderConfig)
        known = known.at(decoder.size).padded(len(keys))
        if decoder.unet.in_channels == 3:
            table = resampled(table, max(1, round(JUMP * int(table.length))), options.resamples or RESAMPLES)
    null, pull = null_text(cascade), {}
    if options.clip_guidance:
        scale = jnp.asarray(per_picture(options.clip_guidance, len(keys)))
        clip = cascade.clip.config.network, on_device(cascade.clip.params)
        pull = {"clip": clip[0], "clip_guidance": ClipGuidance(clip[1], scale)}
    return decode(
        network.config, options.sampler or advice.sampler, on_device(network.params), keys, embedding, text,
        table, per_picture(guidance, len(keys)), np.float32(advice.rescale), np.float32(advice.eta), known=known,
        null=null, **pull,
    )  # fmt: skip


def finish(
    cascade: Cascade,
    keys: Keys,
    pictures: Float[np.ndarray, "b k k 3"] | UInt8[np.ndarray, "b k k 3"],
    size: int,
    progress: Callable[[str], None] = lambda stage: None,
    known: Known | None = None,
) -> UInt8[np.ndarray, "b h w 3"]:
    """The tail that every generation and every edit shares: upsamplers in turn until `size` is reached, then bytes.

    pictures: at the decoder's size, in [-1, 1] or in bytes.
    """
    for network, side in zip(cascade.upsamplers, cascade.sizes[1:], strict=True):
        if pictures.shape[1] >= size:
            break
        pictures = _enlarge(network, keys, pictures, side < size, progress, known)
    return pictures if pictures.dtype == np.uint8 else np.asarray(to_pixels(jnp.asarray(pictures)))


def _enlarge(
    network: Network,
    keys: Keys,
    pictures: Float[np.ndarray, "b k k 3"] | UInt8[np.ndarray, "b k k 3"],
    goes_on: bool,
    progress: Callable[[str], None],
    known: Known | None,
) -> Float[np.ndarray, "b h w 3"] | UInt8[np.ndarray, "b h w 3"]:
    """One upsampler's pictures, in bytes unless another goes on with them."""
    advice, side = network.config.sample, network.config.network.size  # type: ignore[union-attr]
    enlarge = partial(upsample, network.config, advice.sampler, on_device(network.params))
    table, eta, larger = table_of(network.config, advice.steps), np.float32(advice.eta), []
    # One picture per device at a time: memory does not grow with their number, and any number shares one program.
    for row in range(0, len(pictures), ways := row_ways()):
        some = np.arange(row, min(row + ways, len(pictures)))
        for _ in some:
            progress(f"upsampler {side} px")
        filled = np.minimum(np.arange(row, row + ways), len(pictures) - 1)
        kept = None if known is None else known.rows(slice(row, row + ways)).at(side).padded(ways)
        drawn = enlarge(keys[filled], jnp.asarray(pictures[filled]), table, eta, kept)
        larger.append(np.asarray(drawn if goes_on else to_pixels(drawn))[: len(some)])
    return np.concatenate(larger)
