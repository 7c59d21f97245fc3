"""Weights that undo what filters did to the frequencies of things: the density ratio of all records to those kept.

A filter that finds one thing more often than another shifts what a model learns to draw (DALL-E 2's own finding). A
classifier gives the ratio p(x | all) / p(x | kept), which is 1 / p(kept | x) but for a factor. It is trained to tell
removed records from kept ones: against all of them, most examples would stand on both sides. Its log odds only rank
the records, each by a probe that had not seen it; how many of such a rank were removed is counted (see calibration),
so that every rank gets back what it lost.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.curate import manifest
from unclip_jax.curate.calibration import isotonic, shares
from unclip_jax.curate.features import Features, features_of, in_blocks
from unclip_jax.curate.manifest import CurationError
from unclip_jax.curate.probe import FOLDS, load_probe, save_probe, train
from unclip_jax.data.embeddings import Embeddings, Part

SAMPLED = 50_000  # rows of each kind, kept and removed, that the probe sees at most
HIDDEN = 32  # width of the probe's hidden layer: what was removed is seldom on one side of a plane
CALIBRATION = "calibration.npy"


def reweight(
    embeddings: Embeddings,
    out: Path,
    after: Sequence[Path],
    *,
    base: Sequence[Path] = (),
    features: Features = "both",
    hidden: int = HIDDEN,
    most: float = 10.0,
    seed: int = 0,
    part: Part = Part(),  # noqa: B008
) -> None:
    """Weighs this part's kept rows by the density ratio, at most `most`.

    after: the steps whose effect is undone. base: steps before those, whose effect stays (duplicates that were removed
    are not to be made up for). Raises CurationError where `after` names no step.
    """
    if not after:
        raise CurationError("there is nothing to make up for: name the filter with --after")
    everything, kept = manifest.alive(embeddings, base), manifest.alive(embeddings, [*base, *after])
    if not kept.any():
        raise CurationError("the steps before leave no record: loosen one of them")
    if (everything & ~kept).sum() < 2:
        raise CurationError("the steps of --after removed next to nothing: there is nothing to make up for")
    parameters = {"features": features, "hidden": hidden, "most": most, "seed": seed}
    parameters["base"] = [manifest.read_summary(folder)["manifest"] for folder in base]
    manifest.begin(out, "reweight", embeddings, parameters, [*base, *after])
    paths = [out / f"probe-{fold}.safetensors" for fold in range(FOLDS)]
    if not all(path.is_file() for path in [*paths, out / CALIBRATION]):  # another part may have trained it
        rng = np.random.default_rng([seed, 8])
        sides = [np.flatnonzero(everything & ~kept), np.flatnonzero(kept)]
        drawn = [rng.choice(side, min(SAMPLED, len(side)), replace=False) for side in sides]
        labels = np.repeat([True, False], [len(rows) for rows in drawn])
        rows = np.concatenate(drawn)
        trained = train(features_of(embeddings, rows, features), labels, hidden, seed, folds=rows % FOLDS)
        for path, probe in zip(paths, trained.without, strict=True):
            save_probe(path, probe._replace(features=features), embeddings.about.clip)
        stand_for = [len(side) / len(rows) for side, rows in zip(sides, drawn, strict=True)]
        counts = np.repeat(stand_for, [len(rows) for rows in drawn])
        manifest.save_array(out / CALIBRATION, isotonic(trained.held_out, labels, counts))
    calibration = np.load(out / CALIBRATION, allow_pickle=False)
    scorers = [in_blocks(embeddings, load_probe(path, embeddings.about.clip).logits, features) for path in paths]
    weights = []
    for number in part.of(embeddings.about.shards):
        # A row is judged by the probe that had not seen it, which would else know that this one was kept.
        logits = np.stack([score(number) for score in scorers])
        rows = number * embeddings.about.shard_rows + np.arange(logits.shape[1])
        removed = shares(calibration, logits[rows % FOLDS, np.arange(len(rows))])
        weights.append(np.where(kept[rows], 1 / np.maximum(1 - removed, 1 / most), 0).astype(np.float32))
    manifest.save_array(manifest.part_path(out, part, "npy"), np.concatenate([np.zeros(0, np.float32), *weights]))
    manifest.write_part(out, part, (), {"looked_at": sum(int((w > 0).sum()) for w in weights)})


def merge(embeddings: Embeddings, out: Path) -> dict[str, Any]:
    """Joins the parts, brings the mean weight of what is kept to 1, and writes the step; returns its summary."""
    paths = manifest.parts_of(out)
    size, total = embeddings.about.shard_rows, len(embeddings)
    weights = np.empty(total, np.float32)
    for index, path in enumerate(paths):
        values, first = np.load(path.with_suffix(".npy"), allow_pickle=False), 0
        for number in Part(index, len(paths)).of(embeddings.about.shards):
            length = min(size, total - number * size)
            weights[number * size : number * size + length] = values[first : first + length]
            first += length
    kept = weights[weights > 0].astype(np.float64)
    scale = 1 / kept.mean()
    manifest.save_weights(out / manifest.WEIGHTS, embeddings, weights * np.float32(scale))
    figures = manifest.summed(paths) | {
        "least_weight": float(kept.min() * scale),
        "largest_weight": float(kept.max() * scale),
        "effective_share": float(kept.sum() ** 2 / (kept**2).sum() / len(kept)),
    }
    return manifest.finish(out, (), figures)
