"""What the pictures of one setting are worth, metric by metric, with the noise of each estimate where it has one."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, UInt8

from unclip_jax.evaluate.distances import SCALE, Moments, cmmd, frechet, kernel, precision_recall
from unclip_jax.evaluate.faithfulness import Judge
from unclip_jax.evaluate.features import Eye, Seen, check_comparable, look
from unclip_jax.evaluate.pairs import Pairs, reduced
from unclip_jax.evaluate.scenes import score

Metric = Literal[
    "faithfulness", "clip", "retrieval", "prior", "fd", "cmmd", "precision", "fid", "diversity", "reconstruction",
    "memorisation",
]  # fmt: skip
METRICS: tuple[Metric, ...] = get_args(Metric)
SWEPT: tuple[Metric, ...] = ("faithfulness", "clip", "retrieval", "fd", "cmmd", "precision", "diversity")
SET = 64  # pictures that a caption chooses from
GROUP = 8  # pictures of one caption, whose diversity is measured
DRAWS, MOST = 200, 2048  # of the bootstrap: resamples, and pictures

# What a figure is called, in which direction it is better, and what it says.
ABOUT: dict[str, tuple[Literal["up", "down", ""], str]] = {
    "faithfulness": ("up", "share of objects, places and backgrounds that are as the caption says"),
    "objects": ("up", "share of objects that are the right ones"),
    "places": ("up", "share of pairs that stand to each other as the caption says"),
    "backgrounds": ("up", "share of backgrounds of the right colour"),
    "CLIP score": ("up", "mean cosine of picture and caption to the cascade's own CLIP"),
    "retrieval": ("up", "share of captions that find their picture among 64 (or all, where there are fewer)"),
    "prior, cosine to true": ("up", "of the prior's embedding to that of the real picture"),
    "prior, cosine of text": ("", "the same of the text embedding: what a prior has to beat"),
    "prior, cosine shuffled": ("", "the same of another caption's prior embedding: chance"),
    "prior, cosine of mean": ("", "the same of the mean real embedding"),
    "FD": ("down", "Fréchet distance to the real pictures in CLIP's space"),
    "CMMD": ("down", "maximum mean discrepancy to the real pictures in CLIP's space, times 1000"),
    "FID": ("down", "Fréchet distance to the real pictures in InceptionV3's space"),
    "precision": ("up", "share of pictures that lie among the real ones"),
    "recall": ("up", "share of real pictures that lie among these"),
    "diversity": ("", "mean distance (1 - cosine to CLIP) of two pictures of one caption"),
    "reconstruction, PSNR": ("up", "dB, of pictures inverted and drawn again"),
    "reconstruction, SSIM": ("up", "of the same"),
    "reconstruction, distance": ("down", "of the same, in CLIP's inner features (like LPIPS, without its weights)"),
    "median levels": ("", "root mean square difference to the nearest training picture, of 255 levels"),
    "median cosine": ("", "to the nearest training picture, to CLIP"),
    "copies": ("down", "share within 8 levels of a training picture"),
    "close to CLIP": ("down", "share nearer to a training picture, to CLIP, than 95% of the held-out pictures are"),
}


class Ruler(NamedTuple):
    """What the pictures of all settings are held against.

    text: CLIP's embeddings of the captions. real: through CLIP. inception, real_inception: where FID is measured.
    """

    pairs: Pairs
    clip: Eye
    text: Float[np.ndarray, "n d"]
    real: Seen
    judge: Judge | None = None
    inception: Eye | None = None
    real_inception: Seen | None = None


class Scored(NamedTuple):
    """figures, and their standard errors where they have one. features: CLIP's, of each picture.

    each: the share of each picture that is faithful, else its CLIP score.
    """

    figures: dict[str, float]
    errors: dict[str, float]
    features: Float[np.ndarray, "n d"]
    each: Float[np.ndarray, " n"]


def scored(ruler: Ruler, pictures: UInt8[np.ndarray, "n h w 3"], metrics: Sequence[Metric], batch: int = 64) -> Scored:
    """Every metric of pictures alone; picture i is of caption i."""
    seen = look(ruler.clip, pictures, batch)
    cosines = (seen.features * ruler.text[: len(seen.features)]).sum(1)
    figures, errors, each = {}, {}, cosines
    if "faithfulness" in metrics and ruler.judge is not None:
        each, parts = faithful(ruler.judge, pictures, ruler.pairs)
        figures |= {"faithfulness": float(each.mean())} | parts
        errors["faithfulness"] = _standard_error(each)
    if "clip" in metrics:
        figures["CLIP score"], errors["CLIP score"] = float(cosines.mean()), _standard_error(cosines)
    if "retrieval" in metrics:
        hits = retrieved(ruler.text[: len(seen.features)], seen.features)
        figures["retrieval"], errors["retrieval"] = float(hits.mean()), _standard_error(hits)
    if "fd" in metrics:
        figures["FD"] = frechet(ruler.real.moments, seen.moments)
    if "cmmd" in metrics:
        figures["CMMD"] = cmmd(ruler.real.features, seen.features)
        shrink = np.sqrt(min(len(pictures), MOST) / len(pictures))
        errors["CMMD"] = float(bootstrapped_cmmd(ruler.real.features, seen.features).std() * shrink)
    if "precision" in metrics:
        space = ruler.real.features, seen.features
        figures["precision"], figures["recall"] = precision_recall(*space)
    if "fid" in metrics and ruler.inception is not None and ruler.real_inception is not None:
        other = look(ruler.inception, pictures, batch, "InceptionV3")
        check_comparable(ruler.real_inception, other)
        figures["FID"] = frechet(ruler.real_inception.moments, other.moments)
    return Scored(figures, errors, seen.features, np.asarray(each, np.float32))


def faithful(
    judge: Judge, pictures: UInt8[np.ndarray, "n h w 3"], pairs: Pairs
) -> tuple[Float[np.ndarray, " n"], dict[str, float]]:
    """The share of each picture that is as its scene says, and the rates of objects, places and backgrounds."""
    scenes = pairs.scenes[: len(pictures)]
    found = score(reduced(pictures), scenes, judge.renderer, judge.concepts)
    pair = found.asked[:, 1:].any(axis=1)
    right = (found.identity & found.asked).sum(1) + (found.relation & pair) + found.background
    parts = {"objects": float(found.identity[found.asked].mean()), "backgrounds": float(found.background.mean())}
    if pair.any():
        parts["places"] = float(found.relation[pair].mean())
    return right / (found.asked.sum(1) + pair + 1), parts


def retrieved(text: Float[np.ndarray, "n d"], pictures: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """1 where a caption is nearer to its own picture than to any other of its set of SET, else 0; ties miss."""
    hits = []
    for start in range(0, len(text), SET):
        similarity = text[start : start + SET] @ pictures[start : start + SET].T
        own = np.diagonal(similarity)
        others = np.where(np.eye(len(own), dtype=bool), -np.inf, similarity)
        hits.append(own > others.max(1))
    return np.concatenate(hits).astype(np.float64)


def diversity(features: Float[np.ndarray, "n d"], group: int = GROUP) -> Float[np.ndarray, " g"]:
    """Mean of 1 - cosine over all pairs of each caption's pictures, which lie behind one another."""
    sets = features.reshape(-1, group, features.shape[-1]).astype(np.float64)
    cosines = np.einsum("gad,gbd->gab", sets, sets)
    return 1 - (cosines.sum((1, 2)) - group) / (group * (group - 1))


def prior_figures(
    made: Float[np.ndarray, "n d"], text: Float[np.ndarray, "n d"], real: Float[np.ndarray, "n d"]
) -> dict[str, float]:
    """Cosines to the real pictures' embeddings: of the prior's, and of what it has to beat. All of unit length."""
    mean = real.mean(0) / max(float(np.linalg.norm(real.mean(0))), 1e-8)
    return {
        "prior, cosine to true": float((made * real).sum(1).mean()),
        "prior, cosine of text": float((text * real).sum(1).mean()),
        "prior, cosine shuffled": float((np.roll(made, 1, axis=0) * real).sum(1).mean()),
        "prior, cosine of mean": float((real @ mean).mean()),
    }


def bootstrapped_cmmd(
    real: Float[np.ndarray, "n d"], drawn: Float[np.ndarray, "n d"], seed: int = 0
) -> Float[np.ndarray, " draws"]:
    """CMMD of DRAWS resamples of the captions, each with its real and its drawn picture, of the first MOST.

    The same captions for every setting, so that differences are paired. Values are too high by what resampling
    doubles, which their spread does not see.
    """
    real, drawn = real[:MOST], drawn[:MOST]
    rng, count = np.random.default_rng(seed), len(drawn)
    weights = rng.multinomial(count, np.full(count, 1 / count), DRAWS) / count
    apart = kernel(real, real) + kernel(drawn, drawn) - 2 * kernel(drawn, real)
    return SCALE * np.einsum("kn,kn->k", weights @ apart, weights)


def floor_figures(ruler: Ruler, other: Seen) -> dict[str, float]:
    """What the real pictures score, and distances between them and as many real pictures of other captions."""
    few = min(len(ruler.real.features), len(other.features))
    figures = {
        "CLIP score": float((ruler.real.features * ruler.text[: len(ruler.real.features)]).sum(1).mean()),
        "retrieval": float(retrieved(ruler.text[:few], ruler.real.features[:few]).mean()),
        "CMMD": cmmd(ruler.real.features, other.features),
    }
    if min(ruler.real.moments.count, other.moments.count) > 1:
        figures["FD"] = frechet(ruler.real.moments, other.moments)
    if few > 3:
        figures["precision"], figures["recall"] = precision_recall(ruler.real.features, other.features)
    return figures


def check_rank(moments: Moments, what: str) -> None:
    """ValueError where there are too few pictures for a covariance of full rank."""
    if moments.count <= len(moments.mean):
        raise ValueError(
            f"{what} needs more than {len(moments.mean)} pictures for the covariance of its features, not "
            f"{moments.count}: take more, or choose the metric cmmd, which needs no covariance"
        )


def _standard_error(values: Float[np.ndarray, " n"]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
