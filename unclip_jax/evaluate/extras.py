"""Measurements that draw pictures of their own: reconstructions, and what training pictures samples resemble."""

import numpy as np
from jaxtyping import Float, UInt8

from unclip_jax.cascade import Cascade
from unclip_jax.config import ClipConfig
from unclip_jax.edit import draw, invert_pictures
from unclip_jax.evaluate.features import look
from unclip_jax.evaluate.memorisation import copy_report, nearest
from unclip_jax.evaluate.pairs import read_pairs, reduced
from unclip_jax.evaluate.quality import Ruler
from unclip_jax.evaluate.report import Report
from unclip_jax.evaluate.similarity import patch_distance, psnr, ssim
from unclip_jax.inputs import Options, picture_keys
from unclip_jax.offload import on_device

REBUILT = 32  # pictures that are inverted


def reconstruction_figures(cascade: Cascade, ruler: Ruler, options: Options) -> dict[str, float]:
    """Mean PSNR, SSIM and distance of the first real pictures, inverted by DDIM and drawn again, without guidance."""
    config = cascade.clip.config.network
    assert isinstance(config, ClipConfig)
    true = reduced(ruler.pairs.pictures[:REBUILT], cascade.sizes[0])
    steps = Options(size=cascade.sizes[0], steps=options.steps)
    latent = invert_pictures(cascade, list(true), [""] * len(true), steps)
    rebuilt = draw(cascade, picture_keys(0, len(true)), latent, steps)
    apart = np.asarray(patch_distance(config, on_device(cascade.clip.params), true, rebuilt))
    return {
        "reconstruction, PSNR": float(psnr(true, rebuilt).mean()),
        "reconstruction, SSIM": float(ssim(true, rebuilt).mean()),
        "reconstruction, distance": float(apart.mean()),
    }


def memorisation_report(
    cascade: Cascade,
    ruler: Ruler,
    pictures: UInt8[np.ndarray, "n h w 3"],
    features: Float[np.ndarray, "n d"],
    training: str,
    count: int,
    batch: int = 64,
) -> Report:
    """The nearest of the first `count` training pictures of a source, of samples and of the held-out pictures.

    Larger pictures are compared at the decoder's side, at which training pictures are kept: so many would fill memory.
    """
    side, size, real, known = cascade.sizes[0], ruler.pairs.size, ruler.pairs.pictures, ruler.real.features
    if side < size and size % side == 0:
        pictures, real = reduced(pictures, side), reduced(real, side)
        features = look(ruler.clip, pictures, batch, "samples").features
        known = look(ruler.clip, real, batch, "real pictures").features
    else:
        side = size
    trained = read_pairs(cascade, training, count, side)
    those = look(ruler.clip, trained.pictures, batch, "training pictures").features
    keys = trained.pictures[: len(those)]
    held_out = nearest(real[: len(known)], known, keys, those)
    return copy_report(pictures, nearest(pictures[: len(features)], features, keys, those), held_out, keys)
