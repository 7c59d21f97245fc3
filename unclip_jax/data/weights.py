"""Sampling weights of a source's records, from a file."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float

from unclip_jax.checkpoint.sources import open_safetensors
from unclip_jax.data.records import DataError, Source
from unclip_jax.data.stored import StoredSource


def read_weights(path: str, source: Source) -> Float[np.ndarray, " n"]:
    """One weight per record, float64.

    path: .safetensors is what unclip data curate writes; .npy holds one number per record in the source's order; .jsonl
    and .csv hold `key` and `weight`, and a record that they do not name has weight 0. Raises DataError where the file
    cannot be read or names no record.
    """
    try:
        match os.path.splitext(path)[1].lower():
            case ".npy":
                weights = np.load(path, allow_pickle=False).astype(np.float64)
            case ".safetensors":
                weights = _curated(path, source)
            case ".jsonl" | ".csv" as ending:
                named = dict(_named(path, ending))
                weights = np.asarray([named.get(source.key(i), 0.0) for i in range(len(source))], np.float64)
            case ending:
                raise DataError(
                    f"'{path}': weights are read from .safetensors, .npy, .jsonl or .csv, not from '{ending}'"
                )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read the weights '{path}': {type(error).__name__} {error}") from error
    if weights.shape != (len(source),):
        raise DataError(f"'{path}' holds weights of the shape {list(weights.shape)} for {len(source):,} records")
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.max() > 0):
        raise DataError(
            f"'{path}': weights have to be finite, none below 0, and one above 0 for a record of this source"
        )
    return weights


def _curated(path: str, source: Source) -> Float[np.ndarray, " n"]:
    arrays, metadata = open_safetensors(Path(path))
    embedded = source.source if isinstance(source, StoredSource) else source
    if metadata.get("digest") not in (source.digest, embedded.digest):
        raise DataError(f"'{path}' was made for another list of records than '{source.name}' has now: curate it again")
    return np.asarray(arrays["weights"], np.float64)


def _named(path: str, ending: str) -> Iterator[tuple[str, float]]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file) if ending == ".csv" else (json.loads(line) for line in file if line.strip())
        for row in rows:
            yield str(row["key"]), float(row["weight"])
