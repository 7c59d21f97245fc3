"""200 steps of training from every kind of source, by the real command; the same pictures give the same losses.

    python tests/data/train_every_source.py --out tests/results/sources.json

Captioned JPEGs of scenes are written as a folder, as tables (CSV, JSONL, Parquet), as tars, as a tensorflow-datasets
dataset, as one of Hugging Face's, and are embedded. `unclip train --config quick_clip` then runs on each but the last,
and `--config quick_prior` on the embeddings of the folder and of the tars. All loss curves and weights of one network
have to be equal, bit for bit, and so have the batches, which are read once more beside the training.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from conftest import add, jpeg
from test_sources import of_csv, of_hub, of_jsonl, of_parquet, of_tfds

from unclip_jax.config import DataConfig
from unclip_jax.data.loader import batches
from unclip_jax.data.scenes import SceneSource

BATCH, VOCABULARY = 8, 49408
Pictures = list[tuple[bytes, list[str]]]


def pictures_of(count: int) -> Pictures:
    """JPEGs of scenes, one caption each."""
    source = SceneSource("emoji")
    records = [source[index] for index in range(count)]
    return [(jpeg(np.asarray(record.image)), list(record.captions)) for record in records]


def of_folder(place: Path, pictures: Pictures) -> str:
    for number, (data, captions) in enumerate(pictures):
        (place / f"{number:05d}.jpg").write_bytes(data)
        (place / f"{number:05d}.txt").write_text("\n".join(captions))
    return f"folder:{place}"


def of_tars(place: Path, pictures: Pictures) -> str:
    half = len(pictures) // 2
    for shard in range(2):
        with tarfile.open(place / f"{shard:05d}.tar", "w") as tar:
            for number, (data, captions) in list(enumerate(pictures))[shard * half : (shard + 1) * half]:
                add(tar, f"{number:09d}.jpg", data)
                add(tar, f"{number:09d}.txt", "\n".join(captions).encode())
    return f"tar:{place}/*.tar"


MAKERS = {"folder": of_folder, "csv": of_csv, "jsonl": of_jsonl, "parquet": of_parquet, "tar": of_tars}
MAKERS |= {"tfds": of_tfds, "hf": of_hub}


def unclip(*arguments: Any) -> float:
    """Runs the command; returns its seconds, and stops here with its last lines where it fails."""
    since = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "unclip_jax.cli", *map(str, arguments)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"unclip {' '.join(map(str, arguments))}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return round(time.perf_counter() - since, 1)


def digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


def train(name: str, source: str, out: Path, steps: int, clip: Path | None = None) -> dict[str, Any]:
    """One run; its loss curve, and digests of that and of the arrays of the weights that it left."""
    options = ["--data.source", source, "--data.batch-size", BATCH, "--steps", steps, "--log-every", 1]
    options += ["--save-every", steps, "--preview-every", 10**6, "--seed", 3]
    options += ["--network.vocab-size", VOCABULARY] if clip is None else ["--clip", clip, "--data.stored", 0]
    seconds = unclip("train", "--config", name, "--out", out, *options)
    lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    weights = (out / ("clip" if clip is None else "prior")).with_suffix(".safetensors").read_bytes()
    arrays = weights[8 + int.from_bytes(weights[:8], "little") :]  # the header tells of the run
    return {
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "losses": digest(json.dumps(losses).encode()),
        "weights": digest(arrays),
        "seconds": seconds,
    }


def batches_of(source: str, steps: int) -> str:
    """Digest of all batches that training sees."""
    config = DataConfig(source=source, batch_size=BATCH, workers=0)
    found = islice(batches(config), steps)
    return digest(*(part.tobytes() for batch in found for part in (batch.image, batch.tokens, batch.mask)))  # type: ignore


def main() -> None:
    """Runs all, prints one JSON line each, and fails where two differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pictures, found = pictures_of(options.pictures), {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.environ["UNCLIP_CACHE_DIR"] = str(place / "cache")
        sources = {}
        for kind, make in MAKERS.items():
            (place / kind).mkdir()
            sources[kind] = make(place / kind, pictures)
            out = place / f"run-{kind}"
            found[kind] = train("quick_clip", sources[kind], out, options.steps)
            found[kind]["batches"] = batches_of(sources[kind], options.steps)
            print(json.dumps({kind: found[kind]}), flush=True)
        clip = place / "run-folder" / "clip.safetensors"
        for kind in ("folder", "tar"):
            unclip("data", "embed", sources[kind], "--out", place / f"embedded-{kind}", "--clip", clip, "--batch", 32)
            source = f"stored:{place}/embedded-{kind}"
            found[f"stored {kind}"] = train("quick_prior", source, place / f"run-stored-{kind}", options.steps, clip)
            print(json.dumps({f"stored {kind}": found[f"stored {kind}"]}), flush=True)
    groups = [list(MAKERS), ["stored folder", "stored tar"]]
    names = ("losses", "weights", "batches")
    same = all(len({found[kind].get(name) for kind in group}) == 1 for group in groups for name in names)
    full = all(row["steps"] == options.steps for row in found.values())
    row = {"pictures": options.pictures, "batch": BATCH, "all_equal": same and full, "sources": found}
    if options.out:
        options.out.write_text(json.dumps(row, indent=1) + "\n")
    if not row["all_equal"]:
        raise SystemExit("two kinds of sources of the same pictures gave different batches, losses or weights")


if __name__ == "__main__":
    main()
