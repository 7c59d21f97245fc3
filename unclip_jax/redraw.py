"""Small pictures as a cascade's own decoder draws them, for its upsampler to learn from.

Blurred true pictures (paper, section 2.1) do not look like a decoder's: an upsampler that only saw those sharpens a
faint halo into a dashed line. Here true pictures are noised to a random level and drawn again from there by the
decoder, given their own embedding and caption. They show what was there where it was, with the decoder's own faults, so
that the large picture they belong to is still the one to aim at.
"""

import hashlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from tqdm import tqdm

from unclip_jax.cascade import load_checked, tokenizer_from
from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.config import ClipConfig, DataConfig, DecoderConfig, TrainConfig
from unclip_jax.data.degrade import area_downsample
from unclip_jax.data.emoji import Renderer
from unclip_jax.data.loader import scenes_of
from unclip_jax.diffusion import gaussian, samplers
from unclip_jax.diffusion.schedule import StepTable, make_schedule, step_table
from unclip_jax.generate import guided_decoder
from unclip_jax.hosts import is_first, wait
from unclip_jax.inputs import embed_images, encode, per_picture, picture_keys
from unclip_jax.stages import to_model, to_pixels
from unclip_jax.types import Keys, Params

BATCH, STEPS = 16, 8
LEVELS = (0.30, 0.65)  # shares of the noise levels between which a picture's lies: all that is fine is drawn anew


def redrawn(data: DataConfig, folder: Path) -> UInt8[np.ndarray, "n low low 3"]:
    """The first `data.redrawn` pictures of a source, reduced and redrawn by the CLIP and decoder in `folder`.

    Made once: later runs of the same networks and data read the file. Raises ValueError where the decoder does not draw
    at the size that the upsampler reads.
    """
    clip = load_checked(folder / "clip.safetensors", ClipConfig)
    decoder = load_checked(folder / "decoder.safetensors", DecoderConfig, clip)
    network = decoder.config.network
    assert isinstance(network, DecoderConfig)
    if network.size != data.low_size or network.unet.in_channels != 3:
        raise ValueError(
            f"the decoder in {folder} draws {network.size} px, and this upsampler reads {data.low_size} px"
        )
    told = (data.concepts, data.backgrounds, data.single_fraction, data.seed, data.size, data.redrawn)
    key = hashlib.sha256(repr((told, clip.digest, decoder.digest)).encode()).hexdigest()[:12]
    path = folder / f"redrawn-{key}.npz"
    if is_first() and not path.exists():
        pictures = np.concatenate(_drawn(data, clip, decoder))[: data.redrawn]
        partial_path = path.with_suffix(".part.npz")
        np.savez_compressed(partial_path, pictures=pictures)
        partial_path.replace(path)
    wait(f"redrawn {key}")
    with np.load(path) as columns:
        return columns["pictures"]


def _drawn(data: DataConfig, clip: Network, decoder: Network) -> list[UInt8[np.ndarray, "b low low 3"]]:
    scenes, renderer, tokenizer = scenes_of(data), Renderer(), tokenizer_from(clip)
    assert isinstance(clip.config.network, ClipConfig) and data.low_size is not None
    rows = []
    for first in tqdm(range(0, data.redrawn, BATCH), desc="redrawing pictures", unit="batch", dynamic_ncols=True):
        batch = [scenes[index] for index in range(first, first + BATCH)]
        true = np.stack([renderer.render(scene, data.size) for scene in batch])
        low = area_downsample(true, data.size // data.low_size)
        tokens = tokenizer.encode([scene.caption for scene in batch])
        embedding = embed_images(clip.config.network, clip.params, jnp.asarray(low))
        share = np.random.default_rng([data.seed, 5, first]).uniform(*LEVELS)
        level = round(share * decoder.config.diffusion.steps)
        table = step_table(np.linspace(level, 0, STEPS).round().astype(int))
        drawn = redraw(
            decoder.config, clip.config, decoder.params, clip.params, low, embedding, tokens.ids, tokens.mask,
            picture_keys(first, BATCH), np.int32(level), table,
        )  # fmt: skip
        rows.append(np.asarray(drawn))
    return rows


@partial(jax.jit, static_argnums=(0, 1))
def redraw(
    config: TrainConfig,
    clip_config: TrainConfig,
    params: Params,
    clip: Params,
    picture: UInt8[Array | np.ndarray, "b s s 3"],
    embedding: Float[Array, "b z"],
    tokens: Int[Array | np.ndarray, "b n"],
    mask: Bool[Array | np.ndarray, "b n"],
    keys: Keys,
    level: Int[Array | np.ndarray, ""],
    table: StepTable,
) -> UInt8[Array, "b s s 3"]:
    """Pictures noised to a level and drawn again from there by DDIM, at the decoder's recommended guidance."""
    schedule, x0 = make_schedule(config.diffusion), to_model(jnp.asarray(picture))
    guidance, rescale = (jnp.asarray(x) for x in (per_picture(config.sample.guidance, len(x0)), config.sample.rescale))
    text = encode(clip_config, clip, tokens, mask)
    denoise = guided_decoder(config, params, embedding, text, guidance, rescale)
    noise = samplers.initial_noise(keys, x0.shape[1:])
    x = gaussian.add_noise(schedule, x0, noise, jnp.full(len(x0), level))
    return to_pixels(samplers.run(samplers.ddim(schedule), denoise, keys, x, table))
