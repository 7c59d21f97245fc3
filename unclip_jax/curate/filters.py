"""Filtering as DALL-E 2's training set was: a probe from a few labels, a threshold by recall, and what to label next.

A label of 1 says that a record is to be removed. The threshold favours recall: what is kept wrongly is learned and
hard to unlearn, what is removed wrongly can be added later.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from unclip_jax.checkpoint.writing import replacing
from unclip_jax.curate import manifest
from unclip_jax.curate.features import Features, features_of, in_blocks
from unclip_jax.curate.manifest import CurationError
from unclip_jax.curate.probe import Trained, check_labels, save_probe, threshold_for, train
from unclip_jax.data.embeddings import Embeddings, Part
from unclip_jax.output import grid, save_png

REMOVE, KEEP = ("1", "remove", "true", "yes"), ("0", "keep", "false", "no")
SAMPLED = 20_000  # rows from which the probe learns what usual variance is
# The first of them also stand for what is to be kept, together as much as all that is labelled so. Some of them are to
# be removed; that shifts the log odds, and the order of records by them hardly (Elkan and Noto, Learning classifiers
# from only positive and unlabeled data, 2008).
UNLABELLED = 2_000
CANDIDATES = 200_000  # rows, drawn at random, among which proposals are looked for


class Labels(NamedTuple):
    """Rows that someone has labelled, and whether they are to be removed."""

    rows: Int[np.ndarray, " l"]
    remove: Bool[np.ndarray, " l"]


def filter_rows(
    embeddings: Embeddings,
    labels: Labels,
    out: Path,
    *,
    recall: float = 0.95,
    features: Features = "both",
    hidden: int = 0,
    seed: int = 0,
    after: Sequence[Path] = (),
    part: Part = Part(),  # noqa: B008
) -> Trained:
    """Removes what a probe of the labels scores above its threshold; writes this part of the step and the probe."""
    check_labels(labels.remove)
    valid = np.flatnonzero(embeddings.valid)
    sample = np.random.default_rng([seed, 9]).choice(valid, min(SAMPLED, len(valid)), replace=False)
    unknown = sample[~np.isin(sample, labels.rows)][:UNLABELLED]
    known, usual, whole = (features_of(embeddings, rows, features) for rows in (labels.rows, unknown, sample))
    counts = len(labels.rows), len(unknown)
    remove = np.concatenate([labels.remove, np.zeros(len(unknown), bool)])
    weights = np.repeat([1 / max(1, (~labels.remove).sum()), 1 / max(1, len(unknown))], counts)
    trained = train(np.concatenate([known, usual]), remove, hidden, seed, whole, weights=weights)
    trained = trained._replace(held_out=trained.held_out[: len(labels.rows)])
    threshold = threshold_for(trained.held_out, labels.remove, recall)
    probe = trained.probe._replace(threshold=threshold, features=features)
    trained = trained._replace(probe=probe)
    parameters = {"recall": recall, "features": features, "hidden": hidden, "seed": seed}
    parameters |= {"labels": len(labels.rows), "l2": trained.penalty}
    manifest.begin(out, "filter", embeddings, parameters, after)
    save_probe(out / "probe.safetensors", probe, embeddings.about.clip)
    score = in_blocks(embeddings, probe.logits, features)
    cut_by(embeddings, score, lambda x: x >= probe.threshold, "filter", out, part, after, held_out(trained, labels))
    return trained


def held_out(trained: Trained, labels: Labels) -> dict[str, float]:
    """Recall and precision that cross-validation found at the threshold; precision counts both classes alike."""
    said = trained.held_out >= trained.probe.threshold
    recall, alarm = said[labels.remove].mean(), said[~labels.remove].mean()
    return {
        "threshold": trained.probe.threshold,
        "held_out_recall": float(recall),
        "held_out_false_alarms": float(alarm),
    }


def cut_by(
    embeddings: Embeddings,
    score: Callable[[int], Float[np.ndarray, " n"]],
    removes: Callable[[Float[np.ndarray, " n"]], Bool[np.ndarray, " n"]],
    why: str,
    out: Path,
    part: Part,
    after: Sequence[Path],
    figures: dict[str, Any],
) -> None:
    """Writes a part of a step that looks at every row alone, by the scores of a shard."""
    left, found = manifest.alive(embeddings, after), {"looked_at": 0} | figures

    def lines() -> Iterator[manifest.Line]:
        for number in part.of(embeddings.about.shards):
            shard, scores = embeddings.shard(number), score(number)
            here = left[shard.first : shard.first + len(scores)]
            found["looked_at"] += int(here.sum())
            gone = np.flatnonzero(here & removes(scores))
            keys = shard.keys if len(gone) else []
            for row in gone:
                rounded = round(float(scores[row]), 5)
                yield {"row": shard.first + int(row), "key": keys[row], "why": why, "score": rounded}

    manifest.write_part(out, part, lines(), found)


def propose(
    embeddings: Embeddings, trained: Trained, labels: Labels, count: int, after: Sequence[Path] = (), seed: int = 0
) -> tuple[Int[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """Rows to label next, and their log odds: drawn at random from what the probe would remove.

    A threshold that favours recall errs by taking too much, so labels tell most there (DALL-E 2's own way to fewer
    false alarms); and a random sample, unlike the most uncertain rows, leaves the threshold's recall what it says.
    Where there is less of that than was asked for, those nearest below the threshold follow.
    """
    left = manifest.alive(embeddings, after)
    left[labels.rows] = False
    rows = np.flatnonzero(left)
    rng = np.random.default_rng([seed, 2, len(labels.rows)])
    if len(rows) > CANDIDATES:
        rows = np.sort(rng.choice(rows, CANDIDATES, replace=False))
    known = features_of(embeddings, rows, trained.probe.features)
    logits = trained.probe.logits(known) if len(rows) else np.zeros(0, np.float32)
    above = rng.permutation(np.flatnonzero(logits >= trained.probe.threshold))
    below = np.flatnonzero(logits < trained.probe.threshold)
    taken = np.concatenate([above, below[np.argsort(-logits[below], kind="stable")]])[:count]
    return rows[taken], logits[taken]


def write_proposals(
    path: Path,
    embeddings: Embeddings,
    rows: Int[np.ndarray, " p"],
    logits: Float[np.ndarray, " p"],
    picture: Callable[[int], UInt8[np.ndarray, "s s 3"]] | None = None,
) -> None:
    """A table with an empty column of labels and, where pictures are at hand, a contact sheet in its order."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("key", "label", "score"))
        for key, logit in zip(embeddings.keys(rows), logits, strict=True):
            writer.writerow((key, "", f"{logit:.4f}"))
    if picture is not None and len(rows):
        save_png(path.with_suffix(".png"), grid(np.stack([picture(int(row)) for row in rows])), {"rows": str(path)})


def read_labels(path: Path, embeddings: Embeddings) -> Labels:
    """Labels of a CSV with the columns key and label (1 or remove, 0 or keep); rows without a label are passed over.

    Raises CurationError for a table of other columns, for keys that the embeddings do not have, and for other labels.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CurationError(f"the labels '{path}' cannot be read ({error}): give a CSV in UTF-8") from error
    if not table or not {"key", "label"} <= set(table[0]):
        raise CurationError(f"the labels '{path}' need a first line with the columns key and label, and lines below it")
    wanted: dict[str, bool] = {}
    for line in table:
        label = (line["label"] or "").strip().lower()
        if label and label not in REMOVE + KEEP:
            raise CurationError(f"the labels '{path}' say '{label}' of {line['key']}: say 1 (remove) or 0 (keep)")
        if label:
            wanted[line["key"]] = label in REMOVE
    places: dict[str, int] = {}
    for number in range(embeddings.about.shards):
        shard = embeddings.shard(number)
        places |= {key: shard.first + row for row, key in enumerate(shard.keys) if key in wanted}
    if unknown := [key for key in wanted if key not in places]:
        raise CurationError(
            f"{len(unknown)} of {len(wanted)} labelled keys are not in '{embeddings.folder}', such as '{unknown[0]}': "
            "label records of this source"
        )
    known = [(row, wanted[key]) for key, row in places.items() if embeddings.valid[row]]
    rows, remove = zip(*known, strict=True) if known else ((), ())
    return Labels(np.asarray(rows, np.int64), np.asarray(remove, bool))
