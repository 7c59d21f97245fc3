"""Cuts by a score: how well CLIP finds that caption and picture agree, or what an aesthetic head says of a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from unclip_jax.curate import manifest
from unclip_jax.curate.features import in_blocks
from unclip_jax.curate.filters import cut_by
from unclip_jax.curate.manifest import CurationError
from unclip_jax.curate.probe import load_probe
from unclip_jax.data.embeddings import Embeddings, Part, unit

SAMPLED = 128  # shards, evenly spaced, from which a share is turned into a score

Scores = Callable[[int], Float[np.ndarray, " n"]]


def clip_scores(embeddings: Embeddings) -> Scores:
    """Cosine of each picture of a shard and the caption that fits it best; -1 without a caption."""

    def of_shard(number: int) -> Float[np.ndarray, " n"]:
        arrays = embeddings.shard(number).arrays
        image, text, ends = unit(arrays["image"]), unit(arrays["text"]), arrays["captions"]
        owner = np.repeat(np.arange(len(image)), np.diff(ends))
        scores = np.full(len(image), -1, np.float32)
        np.maximum.at(scores, owner, (image[owner] * text).sum(1))
        return scores

    return of_shard


def head_scores(embeddings: Embeddings, head: Path) -> Scores:
    """What a probe or a linear head says of each row of a shard."""
    probe = load_probe(head, embeddings.about.clip)
    return in_blocks(embeddings, probe.logits, probe.features)


def cut_below(
    embeddings: Embeddings,
    out: Path,
    *,
    head: Path | None = None,
    least: float | None = None,
    keep: float | None = None,
    after: Sequence[Path] = (),
    part: Part = Part(),  # noqa: B008
) -> float:
    """Removes rows below a score: `least`, or the one at which a share `keep` of what is left stays; returns it.

    head: the file of a head, None: CLIP's score. The share is measured on at most SAMPLED shards, the same in all
    parts. Raises CurationError unless one of least and keep is given.
    """
    if (least is None) == (keep is None):
        raise CurationError("say which score is the least (--least) or which share to keep (--keep), one of them")
    scores = clip_scores(embeddings) if head is None else head_scores(embeddings, head)
    if keep is not None:
        if not 0 < keep < 1:
            raise CurationError(f"a share of {keep:g} cannot be kept: give one between 0 and 1")
        least = _quantile(embeddings, scores, 1 - keep, after)
    assert least is not None
    parameters = {"by": "clip" if head is None else head.name, "least": least, "keep": keep}
    manifest.begin(out, "score", embeddings, parameters, after)
    cut_by(embeddings, scores, lambda x: x < least, "score", out, part, after, {})
    return least


def _quantile(embeddings: Embeddings, scores: Scores, share: float, after: Sequence[Path]) -> float:
    left, shards = manifest.alive(embeddings, after), embeddings.about.shards
    found = []
    for number in np.unique(np.linspace(0, shards - 1, min(SAMPLED, shards)).astype(int)):
        values = scores(int(number))
        first = int(number) * embeddings.about.shard_rows
        found.append(values[left[first : first + len(values)]])
    values = np.concatenate(found)
    if not len(values):
        raise CurationError("no record is left to score: the steps before removed all")
    return float(np.quantile(values, share))
