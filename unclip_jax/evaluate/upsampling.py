"""Upsamplers against antialiased bicubic interpolation of the same degraded picture, on whole held-out renders."""

from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.config import UpsamplerConfig
from unclip_jax.data.degrade import degrade
from unclip_jax.data.emoji import Renderer, Scene, Window
from unclip_jax.data.loader import scenes_of
from unclip_jax.evaluate.report import Report
from unclip_jax.generate import upsample
from unclip_jax.inputs import picture_keys, table_of
from unclip_jax.models.upsampler import resize_low
from unclip_jax.offload import on_device
from unclip_jax.stages import to_model, to_pixels

SHOWN = 6  # rows of the sheet per upsampler
TILE = 256  # side of its pictures; larger ones are cut around an object


def psnr(a: UInt8[np.ndarray, "*#b h w 3"], b: UInt8[np.ndarray, "*#b h w 3"]) -> Float[np.ndarray, "*b"]:
    """Peak signal-to-noise ratio of bytes in dB, over all pixels and channels of each picture; inf where equal."""
    error = np.square(a.astype(np.float64) - b).mean((-3, -2, -1))
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(255.0**2 / error))


@partial(jax.jit, static_argnums=1)
def bicubic(low: UInt8[Array, "b k k 3"], size: int) -> UInt8[Array, "b h w 3"]:
    """Antialiased bicubic enlargement, rounded to bytes."""
    return to_pixels(resize_low(to_model(low), size))


def object_window(scene: Scene, size: int, side: int) -> Window:
    """A window of `side` pixels inside a picture of `size`, around its first object's upper left quarter."""
    item = scene.items[0]
    scale = size // 64
    x, y = (int(np.clip((start + item.side / 4) * scale - side / 2, 0, size - side)) for start in (item.x, item.y))
    return Window(x, y, side)


def upsampler_report(upsampler: Network, count: int = 32, seed: int = 0) -> Report:
    """Mean PSNR in dB of an upsampler and of bicubic on `count` held-out renders, corrupted as in its training.

    Rows of the sheet: bicubic, upsampled, true.
    """
    config = upsampler.config.network
    assert isinstance(config, UpsamplerConfig)
    scenes, renderer = scenes_of(upsampler.config.data, "held_out"), Renderer()
    advice = upsampler.config.sample
    steps, params = table_of(upsampler.config, advice.steps), on_device(upsampler.params)
    scores, rows = [], []
    name = f"{config.low_size} to {config.size} px"
    for index in tqdm(range(count), desc=name, unit="picture", dynamic_ncols=True):
        scene = scenes[index]
        true = renderer.render(scene, config.size)
        rng = np.random.default_rng([seed, index])
        low = degrade(config.degradation, true, config.size // config.low_size, rng)[None]
        keys = picture_keys(seed + index, 1)
        drawn = upsample(upsampler.config, advice.sampler, params, keys, low, steps, np.float32(advice.eta))
        three = np.stack([np.asarray(bicubic(low, config.size))[0], np.asarray(to_pixels(drawn))[0], true])
        scores.append(psnr(three[:2], true))
        if index < SHOWN:
            x, y, side = object_window(scene, config.size, min(config.size, TILE))
            rows.append(three[:, y : y + side, x : x + side])
    flat, sharp = np.stack(scores, axis=1)
    columns = {"bicubic dB": flat, "upsampler dB": sharp, "gain dB": sharp - flat}
    figures = {column: float(values.mean()) for column, values in columns.items()}
    figures["smallest gain dB"] = float((sharp - flat).min())
    return Report({f"{name}, {config.degradation}": figures}, tuple(rows))
