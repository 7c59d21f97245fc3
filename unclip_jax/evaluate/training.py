"""A small evaluation while a network trains: what it makes of a few pictures that it never sees, as one score."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.config import ArPriorConfig, ClipConfig, DecoderConfig, PriorConfig, TrainConfig, UpsamplerConfig
from unclip_jax.data.decode import at_size
from unclip_jax.data.degrade import degrade
from unclip_jax.data.embeddings import unit
from unclip_jax.data.emoji import Renderer, Scene
from unclip_jax.data.loader import scenes_of
from unclip_jax.data.records import Broken, open_source
from unclip_jax.data.tokenizer import TextTokenizer
from unclip_jax.evaluate.distances import cmmd
from unclip_jax.evaluate.faithfulness import Judge
from unclip_jax.evaluate.features import embed_captions
from unclip_jax.evaluate.quality import prior_figures, retrieved
from unclip_jax.evaluate.scenes import score
from unclip_jax.evaluate.similarity import psnr
from unclip_jax.evaluate.upsampling import bicubic
from unclip_jax.generate import decode, upsample
from unclip_jax.inputs import RECOMMENDED, Text, embed_images, encode, per_picture, picture_keys, table_of
from unclip_jax.priors import prior_embeddings
from unclip_jax.stages import to_pixels
from unclip_jax.types import Params

BATCH = 16

Check = Callable[[Params], dict[str, float]]


def check_of(
    config: TrainConfig, clip: Network | None, tokenizer: TextTokenizer, constants: dict[str, dict[str, np.ndarray]]
) -> Check:
    """What measures parameters of the network that a config trains: figures by name, `score` that rises with quality.

    score: of a CLIP the share of captions that find their picture; of priors the cosine to the true embedding; of a
    decoder, which is given true embeddings, the cosine of its pictures' embeddings to them; of an upsampler the dB that
    it gains on bicubic. On config.eval_pictures held-out scenes, or the first pictures of config.eval_source, in every
    process alike. Raises ValueError where that source is missing or empty, or the network needs more than these give.
    """
    match config.network:
        case DecoderConfig(unet=unet) if unet.in_channels != 3:
            raise ValueError("an inpainting decoder is measured by unclip evaluate painting: set --eval-every 0")
        case UpsamplerConfig(text_encoder=encoder) if encoder is not None:
            raise ValueError("upsamplers that read text are not measured while they train: set --eval-every 0")
    captions, pictures, scenes = _held_out(config)

    def network(params: Params) -> Network:
        return Network(config, params, constants, None if clip is None else clip.digest, "", {})

    match config.network:
        case ClipConfig() as clip_config:

            def clip_check(params: Params) -> dict[str, float]:
                text = embed_captions(network(params), captions, tokenizer, BATCH)
                hits = retrieved(text, _embedded(clip_config, params, pictures))
                return {"score": float(hits.mean())}

            return clip_check
        case UpsamplerConfig():
            lows = _degraded(config, pictures)
            return lambda params: _enlarged(config, params, lows, pictures)
        case _:
            assert clip is not None and isinstance(clip.config.network, ClipConfig)
            true = _embedded(clip.config.network, clip.params, pictures)
            if isinstance(config.network, DecoderConfig):
                judge = Judge(Renderer(), scenes_of(config.data).concepts, False) if scenes else None
                told = _texts(clip, tokenizer, captions), _texts(clip, tokenizer, ("",))[0]
                return lambda params: _decoded(config, clip, params, told, true, scenes, judge)
            text = embed_captions(clip, captions, tokenizer, BATCH)
            told, null = _texts(clip, tokenizer, captions), _texts(clip, tokenizer, ("",))[0]

            def prior_check(params: Params) -> dict[str, float]:
                made = [
                    np.asarray(
                        prior_embeddings(network(params), picture_keys(i * BATCH, BATCH), part, null, RECOMMENDED)
                    )
                    for i, part in enumerate(told)
                ]
                figures = prior_figures(unit(np.concatenate(made))[: len(true)], text, unit(true))
                return {"score": figures["prior, cosine to true"]} | figures

            assert isinstance(config.network, PriorConfig | ArPriorConfig)
            return prior_check


def _held_out(config: TrainConfig) -> tuple[tuple[str, ...], UInt8[np.ndarray, "n h w 3"], tuple[Scene, ...]]:
    count = config.eval_pictures
    if config.eval_source is None:
        if config.data.source != "emoji":
            raise ValueError("name pictures that training does not see with --eval-source, or set --eval-every 0")
        source, renderer = scenes_of(config.data, "held_out"), Renderer()
        scenes = tuple(source[index] for index in range(count))
        pictures = np.stack([renderer.render(scene, config.data.size) for scene in scenes])
        return tuple(scene.caption for scene in scenes), pictures, scenes
    captions, rows = [], []
    source = open_source(config.eval_source)
    for index in range(len(source)):
        try:
            record = source[index]
            if record.captions:
                rows.append(at_size(record.image, config.data.size, record.key))
                captions.append(record.captions[0])
        except Broken:
            continue
        if len(rows) == count:
            break
    if not rows:
        raise ValueError(f"'{config.eval_source}' holds no picture with a caption: there is nothing to evaluate on")
    return tuple(captions), np.stack(rows), ()


def _parts(count: int) -> list[np.ndarray]:
    """Rows of batches of one size, the last filled up."""
    return [np.minimum(np.arange(start, start + BATCH), count - 1) for start in range(0, count, BATCH)]


def _texts(clip: Network, tokenizer: TextTokenizer, captions: tuple[str, ...]) -> list[Text]:
    tokens = tokenizer.encode(list(captions))
    rows = _parts(len(captions)) if len(captions) > 1 else [np.zeros(1, int)]
    return [encode(clip.config, clip.params, tokens.ids[part], tokens.mask[part]) for part in rows]


def _embedded(config: ClipConfig, params: Params, pictures: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n z"]:
    """CLIP's embeddings, as other networks see them."""
    found = [np.asarray(embed_images(config, params, pictures[rows]), np.float32) for rows in _parts(len(pictures))]
    return np.concatenate(found)[: len(pictures)]


def _decoded(
    config: TrainConfig,
    clip: Network,
    params: Params,
    told: tuple[list[Text], Text],
    true: Float[np.ndarray, "n z"],
    scenes: tuple[Scene, ...],
    judge: Judge | None,
) -> dict[str, float]:
    advice, network = config.sample, clip.config.network
    assert (
        isinstance(config.network, DecoderConfig) and isinstance(network, ClipConfig) and advice.sampler != "analytic"
    )
    draw = partial(decode, config, advice.sampler, params)
    scale = per_picture(advice.guidance, BATCH), np.float32(advice.rescale), np.float32(advice.eta)
    texts, empty = told
    null, drawn = empty if config.network.empty_null_text else None, []
    for part, rows in zip(texts, _parts(len(true)), strict=True):
        keys = picture_keys(int(rows[0]), BATCH)
        made = draw(keys, jnp.asarray(true[rows]), part, table_of(config, advice.steps), *scale, null=null)
        drawn.append(np.asarray(to_pixels(made)))
    pictures = np.concatenate(drawn)[: len(true)]
    found, wanted = unit(_embedded(network, clip.params, pictures)), unit(true)
    figures = {"score": float((found * wanted).sum(1).mean()), "CMMD": cmmd(wanted, found)}
    if judge is not None and pictures.shape[1] == 64:
        seen = score(pictures, scenes, judge.renderer, judge.concepts)
        figures["objects"] = float(seen.identity[seen.asked].mean())
    return figures


def _degraded(config: TrainConfig, pictures: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n k k 3"]:
    network = config.network
    assert isinstance(network, UpsamplerConfig)
    factor = network.size // network.low_size
    rngs = [np.random.default_rng([config.seed, index]) for index in range(len(pictures))]
    return np.stack([degrade(network.degradation, x, factor, rng) for x, rng in zip(pictures, rngs, strict=True)])


def _enlarged(
    config: TrainConfig, params: Params, lows: UInt8[np.ndarray, "n k k 3"], true: UInt8[np.ndarray, "n h w 3"]
) -> dict[str, float]:
    advice = config.sample
    assert advice.sampler != "analytic"
    table, eta = table_of(config, advice.steps), np.float32(advice.eta)
    gains = []
    for index in range(len(lows)):
        one = slice(index, index + 1)
        keys = picture_keys(index, 1)
        drawn = np.asarray(to_pixels(upsample(config, advice.sampler, params, keys, lows[one], table, eta)))
        gains.append(psnr(drawn, true[one]) - psnr(np.asarray(bicubic(lows[one], true.shape[1])), true[one]))
    return {"score": float(np.concatenate(gains).mean())}
