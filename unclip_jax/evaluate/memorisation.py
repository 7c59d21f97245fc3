"""Does a cascade copy its training pictures? The nearest of them beside every sample, in pixels and in CLIP's space."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from unclip_jax.evaluate.pairs import reduced
from unclip_jax.evaluate.report import Figures, Report
from unclip_jax.evaluate.scenes import wilson

COPY = 8.0  # levels of 255: root mean square difference below which a picture counts as a copy
QUANTILE = 0.05  # of the held-out pictures' own distances, in CLIP's space
ROWS = 64  # samples at a time
SHOWN = 12  # of the sheet: those nearest to a training picture


class Nearest(NamedTuple):
    """The nearest training picture of each picture: its number, and how far it is.

    levels: root mean square over pixels and channels, of 255. cosine: of CLIP's embeddings.
    """

    pixel: Int[np.ndarray, " n"]
    levels: Float[np.ndarray, " n"]
    clip: Int[np.ndarray, " n"]
    cosine: Float[np.ndarray, " n"]


def nearest(
    pictures: UInt8[np.ndarray, "n h w 3"],
    features: Float[np.ndarray, "n d"],
    training: UInt8[np.ndarray, "m h w 3"],
    trained: Float[np.ndarray, "m d"],
) -> Nearest:
    """Exhaustive search; pictures are compared at about 64 px, features are of unit length.

    ValueError where there is no training picture.
    """
    if not len(training):
        raise ValueError("there are no training pictures to compare with")
    keys = reduced(training).reshape(len(training), -1).astype(np.float32)
    queries = reduced(pictures).reshape(len(pictures), -1).astype(np.float32)
    middle = keys.mean(0)
    keys, queries = keys - middle, queries - middle
    norms = np.square(keys).sum(1)
    found = []
    for start in range(0, len(queries), ROWS):
        part = queries[start : start + ROWS]
        found.append((norms - 2 * part @ keys.T).argmin(1))
    pixel = np.concatenate(found)
    levels = np.sqrt(np.square(queries - keys[pixel]).mean(1))
    cosines = features @ trained.T
    clip = cosines.argmax(1)
    return Nearest(pixel, levels, clip, cosines[np.arange(len(clip)), clip])


def copy_figures(drawn: Nearest, held_out: Nearest) -> Figures:
    """How often samples, and real pictures that training never saw, come close to a training picture.

    copies: within COPY levels. close to CLIP: at a cosine that only QUANTILE of the held-out pictures exceeds. Rates
    have 95% intervals; a cascade that copies exceeds the held-out rates.
    """
    limit = float(np.quantile(held_out.cosine, 1 - QUANTILE))
    figures: Figures = {}
    for name, those in (("samples", drawn), ("held-out pictures", held_out)):
        rates = {"copies": those.levels <= COPY, "close to CLIP": those.cosine > limit}
        row = {"median levels": float(np.median(those.levels)), "median cosine": float(np.median(those.cosine))}
        for rate, hits in rates.items():
            low, high = wilson(int(hits.sum()), len(hits))
            row |= {rate: float(hits.mean()), f"{rate} low": low, f"{rate} high": high}
        figures[f"nearest training picture of {name}"] = row
    return figures


def copy_report(
    pictures: UInt8[np.ndarray, "n h w 3"],
    drawn: Nearest,
    held_out: Nearest,
    training: UInt8[np.ndarray, "m h w 3"],
) -> Report:
    """The figures, and rows of sample, nearest in pixels, nearest to CLIP: the closest samples first."""
    order = np.argsort(drawn.levels)[:SHOWN]
    rows = tuple(np.stack([pictures[i], training[drawn.pixel[i]], training[drawn.clip[i]]]) for i in order)
    return Report(copy_figures(drawn, held_out), rows)
