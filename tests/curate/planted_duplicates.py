"""De-duplication of scenes with planted copies, against the list of what was planted; and its growth with rows.

    python tests/curate/planted_duplicates.py --folder /tmp/planted --out tests/results/duplicates.json
    python tests/curate/planted_duplicates.py --seed 12 --pixels 2.8 --folder /tmp/tuning
    python tests/curate/planted_duplicates.py --scenes 3000 --copies 300 --folder /tmp/few
    python tests/curate/planted_duplicates.py --growth 10000 100000 1000000 --out tests/results/duplicates_growth.json

No two scenes show the same objects, which are drawn from all drawings that differ (2,429 of OpenMoji). A copy is a
scene encoded anew as JPEG, resized, cut by 5% of its sides at a random place, or mirrored. Everything runs through
`unclip data embed` and `curate duplicates`; what is embedded in --folder stays there, and a run goes on with it. On 2
cores 3,300 pictures and their mirror images are embedded in some minutes and 55,000 in about an hour; a bar says how
far. The thresholds were chosen on other scenes, those of --seed 12.
"""

import argparse
import io
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, ImageOps

from unclip_jax.checkpoint.writing import save_file
from unclip_jax.curate.duplicates import Settings, search
from unclip_jax.curate.manifest import lines_of
from unclip_jax.curate.steps import merge_step
from unclip_jax.data.embed import Cut, embed
from unclip_jax.data.embeddings import INDEX, About, Embeddings, open_embeddings, shard_metadata, shard_path, unit
from unclip_jax.data.emoji import Renderer, Scene, Scenes
from unclip_jax.data.records import Record
from unclip_jax.data.vocabulary import distinct_concepts
from unclip_jax.embed_command import encoders_of, load_clip

SIDE = 128  # px of a scene
KINDS = ("encoded", "resized", "cropped", "mirrored")
THRESHOLD, PIXELS = 0.87, 3.4
NOISE, WIDTH = 0.01, 128  # of synthetic copies, per component; of synthetic embeddings


class Copy(NamedTuple):
    """Which scene is copied, and how."""

    of: int
    kind: str


class Planted:
    """Scenes, and behind them copies of some."""

    problems: tuple[str, ...] = ()

    def __init__(self, scenes: int, copies: int, seed: int) -> None:
        self.name, self.digest = "planted", f"planted-{scenes}-{copies}-{SIDE}-{seed}"
        self.scenes = list(different(scenes, seed))
        rng = np.random.default_rng(1)
        chosen = rng.choice(scenes, copies, replace=False)
        self.copies = [Copy(int(of), KINDS[number % len(KINDS)]) for number, of in enumerate(chosen)]
        self.renderer = Renderer()

    def __len__(self) -> int:
        return len(self.scenes) + len(self.copies)

    def key(self, index: int) -> str:
        copied = index - len(self.scenes)
        return f"scene {index:06d}" if copied < 0 else f"scene {self.copies[copied].of:06d} {self.copies[copied].kind}"

    def __getitem__(self, index: int) -> Record:
        copied = index - len(self.scenes)
        of = index if copied < 0 else self.copies[copied].of
        scene = self.scenes[of]
        picture = self.renderer.render(scene, SIDE)
        image = picture if copied < 0 else altered(picture, self.copies[copied].kind, np.random.default_rng([2, of]))
        return Record(self.key(index), image, (scene.caption,))


def different(count: int, seed: int) -> Iterator[Scene]:
    """So many scenes, of which no two show the same objects."""
    scenes = Scenes(tuple(concept.hexcode for concept in distinct_concepts()), seed=seed)
    seen: set[frozenset[str]] = set()
    index = 0
    while len(seen) < count:
        scene = scenes[index]
        shown = frozenset(item.concept.hexcode for item in scene.items)
        if shown not in seen:
            seen.add(shown)
            yield scene
        index += 1


def altered(picture: np.ndarray, kind: str, rng: np.random.Generator) -> bytes | np.ndarray:
    """A near-duplicate of a picture."""
    image = Image.fromarray(picture)
    match kind:
        case "encoded":
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=int(rng.integers(50, 91)))
            return buffer.getvalue()
        case "resized":
            side = int(rng.choice([SIDE // 2, SIDE * 3 // 4, SIDE * 3 // 2]))
            return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        case "cropped":
            side = round(0.95 * SIDE)
            x, y = rng.integers(0, SIDE - side + 1, 2)
            return picture[y : y + side, x : x + side].copy()
        case _:
            return np.asarray(ImageOps.mirror(image))


def planted(scenes: int, copies: int, seed: int, folder: Path, settings: Settings) -> dict[str, Any]:
    """Embeds and de-duplicates, and compares with what was planted."""
    source, started = Planted(scenes, copies, seed), time.perf_counter()
    done = embed(
        source, encoders_of(load_clip(None), 256), folder / "embeddings", cut=Cut(4096, mirror=True, thumbnail=32)
    )
    embedded = time.perf_counter()
    embeddings = open_embeddings(folder / "embeddings")
    name = "step-" + "-".join(str(value) for value in settings)
    search(embeddings, settings, folder / name)
    summary = merge_step(embeddings, folder / name)
    seconds = time.perf_counter() - embedded
    gone = {line["key"]: line["of"] for line in lines_of([folder / name / "manifest.jsonl"])}
    by_kind = {}
    for kind in KINDS:
        pairs = [
            (source.key(copy.of), source.key(scenes + n)) for n, copy in enumerate(source.copies) if copy.kind == kind
        ]
        by_kind[kind] = float(np.mean([a in gone or b in gone for a, b in pairs]))
    found = np.mean(
        [source.key(copy.of) in gone or source.key(scenes + n) in gone for n, copy in enumerate(source.copies)]
    )
    wrong = {key: of for key, of in gone.items() if key.split()[1] != of.split()[1]}
    return {
        "scenes": scenes,
        "copies": copies,
        "seed": seed,
        "settings": settings._asdict(),
        "recall": float(found),
        "recall_by_kind": by_kind,
        "false_merges": len(wrong),
        "false_merges_of_scenes": len(wrong) / scenes,
        "false_merges_of_removed": len(wrong) / max(1, len(gone)),
        "examples_of_false_merges": dict(list(wrong.items())[:5]),
        "sampled_recall_of_exact_search": summary["sampled_recall"],
        "embedding_seconds": round(embedded - started, 1) if done.made else None,
        "search_seconds": round(seconds, 1),
        "peak_memory_mb": peak(),
    }


def synthetic(folder: Path, rows: int) -> Embeddings:
    """Random unit embeddings, a tenth of which are near-copies of others, written shard by shard."""
    about = About("synthetic", f"synthetic-{rows}", "none", rows, 8192, WIDTH)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).write_text(json.dumps(about._asdict()))
    copies = rows // 10

    def original(row: int) -> np.ndarray:
        return unit(np.random.default_rng([9, row]).standard_normal(WIDTH, np.float32))

    for number in range(about.shards):
        first, last = number * 8192, min(rows, (number + 1) * 8192)
        x = np.stack([original(row if row < rows - copies else row - (rows - copies)) for row in range(first, last)])
        noise = np.random.default_rng([10, number]).standard_normal(x.shape, np.float32) * NOISE
        x = x + noise * (np.arange(first, last) >= rows - copies)[:, None]
        arrays = {
            "image": x.astype(np.float16),
            "text": np.zeros((0, WIDTH), np.float16),
            "captions": np.zeros(len(x) + 1, np.int64),
            "size": np.ones((len(x), 2), np.int32),
            "valid": np.ones(len(x), bool),
        }
        keys = json.dumps([f"{row:09d}" for row in range(first, last)])
        save_file(arrays, shard_path(folder, number), shard_metadata(about, number) | {"keys": keys, "broken": "[]"})
    return open_embeddings(folder)


def growth(rows: int) -> dict[str, Any]:
    """Time, memory and recall at so many synthetic embeddings."""
    with tempfile.TemporaryDirectory() as place:
        embeddings = synthetic(Path(place) / "embeddings", rows)
        started = time.perf_counter()
        search(embeddings, Settings(0.95), Path(place) / "step")
        searched = time.perf_counter()
        summary = merge_step(embeddings, Path(place) / "step")
        gone = np.load(Path(place) / "step" / "removed.npy")
    copies = rows // 10
    return {
        "rows": rows,
        "recall": float((gone >= rows - copies).sum() / copies),
        "false_merges": int((gone < rows - copies).sum()),
        "sampled_recall_of_exact_search": summary["sampled_recall"],
        "search_seconds": round(searched - started, 1),
        "merge_seconds": round(time.perf_counter() - searched, 1),
        "peak_memory_mb": peak(),
    }


def peak() -> int:
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=50_000)
    parser.add_argument("--copies", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=11, help="of the scenes")
    parser.add_argument("--folder", type=Path, help="of embeddings and steps")
    parser.add_argument("--threshold", type=float, default=THRESHOLD)
    parser.add_argument("--pixels", type=float, default=PIXELS, help="0: do not look at pixels")
    parser.add_argument("--growth", type=int, nargs="+", help="synthetic embeddings instead, ascending")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "cores": len(jax.devices())}
    if options.growth:
        figures: Any = [growth(rows) for rows in options.growth]
    else:
        settings = Settings(options.threshold, mirror=True, pixels=options.pixels or None)
        figures = planted(options.scenes, options.copies, options.seed, options.folder, settings)
    text = json.dumps({"figures": figures} | machine, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
