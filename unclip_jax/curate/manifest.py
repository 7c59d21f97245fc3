"""Manifests: what a step of curation removed, row by row and with the reason, and never a copy of a picture.

A step is a folder. Part i of n writes `part-i-of-n.jsonl`; `merge` makes of all parts

manifest.jsonl   one line per removed record, by row: {"row", "key", "why", ...}
removed.npy      int64, the same rows, ascending
summary.json     step, version, parameters, digests of source, CLIP and of the manifest, the steps before it, counts

A step may come after others, whose removed rows it does not look at; `compose` makes of several steps what a loader
reads: skip.txt (a key and the step that removed it, one a line) and weights.safetensors (one float32 per row, 0 where
it is skipped).
"""

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from unclip_jax import __version__
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.sources import open_safetensors
from unclip_jax.checkpoint.writing import replacing, save_file
from unclip_jax.data.embeddings import Embeddings, Part

MANIFEST, REMOVED, SUMMARY, PLAN = "manifest.jsonl", "removed.npy", "summary.json", "step.json"
WEIGHTS, SKIP = "weights.safetensors", "skip.txt"
Line = dict[str, Any]


class CurationError(ValueError):
    """A step of curation that cannot be done; the text is one sentence."""


def alive(embeddings: Embeddings, after: Sequence[Path]) -> Bool[np.ndarray, " n"]:
    """Rows that are neither broken nor removed by earlier steps."""
    left = embeddings.valid.copy()
    for folder in after:
        left[removed_rows(folder, embeddings)] = False
    return left


def removed_rows(folder: Path, embeddings: Embeddings) -> Int[np.ndarray, " r"]:
    """What a finished step removed; CurationError where it is not finished, or of other embeddings."""
    check_same(read_summary(folder), embeddings.identity, folder)
    return np.load(folder / REMOVED, allow_pickle=False)


def read_summary(folder: Path) -> dict[str, Any]:
    """What a finished step says of itself."""
    if not (folder / SUMMARY).is_file():
        remedy = "merge its parts with unclip data curate merge" if (folder / PLAN).is_file() else "check the path"
        raise CurationError(f"'{folder}' is no finished step of curation (no {SUMMARY}): {remedy}")
    return _json(folder / SUMMARY)


def read_plan(folder: Path) -> dict[str, Any]:
    """What a step that was begun is to do."""
    if not (folder / PLAN).is_file():
        raise CurationError(f"'{folder}' is no step of curation (no {PLAN}): check the path")
    return _json(folder / PLAN)


def check_same(step: Mapping[str, Any], identity: Mapping[str, Any], folder: Path) -> None:
    """CurationError where a step was made of other embeddings than these."""
    for name in ("digest", "clip", "rows"):
        if step.get(name) != identity[name]:
            raise CurationError(
                f"'{folder}' was made of other embeddings (its {name} is {step.get(name)}, here {identity[name]}): "
                "use the steps of one folder of embeddings"
            )


def begin(out: Path, step: str, embeddings: Embeddings, parameters: Mapping[str, Any], after: Sequence[Path]) -> None:
    """Claims a folder for a step, or checks that another part has claimed it for the very same."""
    plan = {
        "step": step,
        "version": __version__,
        **embeddings.identity,
        "after": [read_summary(folder)["manifest"] for folder in after],
        "parameters": dict(parameters),
    }
    if (out / PLAN).is_file():
        known = _json(out / PLAN)
        if different := [name for name in plan if known.get(name) != plan[name]]:
            raise CurationError(
                f"'{out}' holds a step with other {different[0]}: choose a new folder, or give all parts the same"
            )
        return
    write_json(out / PLAN, plan)


def write_part(out: Path, part: Part, lines: Iterable[Line], figures: Mapping[str, Any]) -> None:
    """Writes a part's removed rows, ascending, and then what else it found out."""
    with replacing(part_path(out, part)) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    write_json(part_path(out, part, "json"), dict(figures))


def part_path(out: Path, part: Part, ending: str = "jsonl") -> Path:
    """A file of a part."""
    return out / f"part-{part.index}-of-{part.count}.{ending}"


def parts_of(out: Path, ending: str = "json") -> list[Path]:
    """The files of all parts, in order; CurationError naming those that are missing."""
    found = sorted(out.glob(f"part-*-of-*.{ending}"))
    counts = {int(path.stem.split("-")[3]) for path in found}
    if len(counts) != 1:
        reason = "parts of different divisions" if counts else "no parts"
        raise CurationError(f"'{out}' holds {reason}: run the step in all its parts, into a folder of its own")
    count = counts.pop()
    paths = [part_path(out, Part(index, count), ending) for index in range(count)]
    if missing := [path for path in paths if not path.is_file()]:
        raise CurationError(f"'{missing[0]}' is missing: run that part, then merge again")
    return paths


def finish(out: Path, lines: Iterable[Line], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Writes manifest, removed rows and summary of a step, and returns the summary."""
    rows: list[int] = []
    digest = hashlib.sha256()
    with replacing(out / MANIFEST) as temporary, temporary.open("wb") as file:
        for line in lines:
            text = (json.dumps(line, ensure_ascii=False) + "\n").encode()
            digest.update(text)
            file.write(text)
            rows.append(line["row"])
    save_array(out / REMOVED, np.asarray(rows, np.int64))
    summary = {**_json(out / PLAN), "manifest": digest.hexdigest()[:12], "removed": len(rows), **figures}
    write_json(out / SUMMARY, summary)
    return summary


def lines_of(paths: Sequence[Path]) -> Iterator[Line]:
    """Lines of several files, by row."""
    return heapq.merge(*(_lines(path) for path in paths), key=lambda line: line["row"])


def _lines(path: Path) -> Iterator[Line]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def summed(paths: Sequence[Path]) -> dict[str, Any]:
    """Figures of all parts: numbers are added up, other things are those of the first."""
    tables = [_json(path) for path in paths]
    return {
        name: sum(table[name] for table in tables) if isinstance(value, int) else value
        for name, value in tables[0].items()
    }


def save_weights(path: Path, embeddings: Embeddings, weights: Float[np.ndarray, " n"]) -> None:
    """One weight per row of a source, with the digests by which a loader knows that they belong together."""
    metadata = {name: str(value) for name, value in embeddings.identity.items()}
    with replacing(path) as temporary:
        save_file({"weights": np.asarray(weights, np.float32)}, temporary, metadata)


def load_weights(path: str | Path, digest: str | None = None) -> Float[np.ndarray, " n"]:
    """Weights of the rows of a source, in float32, mapped into memory.

    digest: of the source that they must belong to. Raises CurationError where they do not, or are no weights.
    """
    try:
        arrays, metadata = open_safetensors(Path(path))
    except CheckpointError as error:
        raise CurationError(f"these are no weights: {error}") from error
    if "weights" not in arrays or arrays["weights"].ndim != 1:
        raise CurationError(f"'{path}' holds no weights: make them with unclip data curate reweight or merge")
    if digest is not None and metadata.get("digest") != digest:
        raise CurationError(
            f"'{path}' weighs the records of another source (digest {metadata.get('digest')}, here {digest}): "
            "curate this source"
        )
    return arrays["weights"]


def compose(embeddings: Embeddings, steps: Sequence[Path], out: Path) -> dict[str, Any]:
    """Several steps as one skip list and one weights file: what any removed is out, and weights are multiplied.

    The weights of what is left have mean 1. Returns the summary that it writes.
    """
    reasons = np.where(embeddings.valid, 0, 1).astype(np.uint8)
    names, weights = ["kept", "broken"], np.ones(len(embeddings), np.float32)
    for folder in steps:
        rows = removed_rows(folder, embeddings)
        names.append(f"{read_summary(folder)['step']} ({folder.name})")
        reasons[rows[reasons[rows] == 0]] = len(names) - 1
        if (folder / WEIGHTS).is_file():
            weights *= load_weights(folder / WEIGHTS, embeddings.about.digest)
    left = reasons == 0
    if not (weights * left).any():
        raise CurationError("these steps together leave no record: loosen one of them")
    weights *= left
    weights *= left.sum() / weights.sum(dtype=np.float64)
    save_weights(out / WEIGHTS, embeddings, weights)
    with replacing(out / SKIP) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number in range(embeddings.about.shards):
            shard = embeddings.shard(number)
            own = reasons[shard.first : shard.first + embeddings.about.shard_rows]
            file.writelines(f"{key}\t{names[why]}\n" for key, why in zip(shard.keys, own, strict=True) if why)
    manifests = [read_summary(folder)["manifest"] for folder in steps]
    counts = dict(zip(names[1:], np.bincount(reasons, minlength=len(names))[1:].tolist(), strict=True))
    figures = {"left": int(left.sum()), "removed_by": counts}
    summary = {"version": __version__, **embeddings.identity, "steps": manifests, **figures}
    write_json(out / SUMMARY, summary)
    return summary


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an .npy file, which appears whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """Writes a table, which appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CurationError(f"'{path}' cannot be read ({error}): run the step again") from error
