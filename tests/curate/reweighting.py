"""What the filter finds with few labels, and what re-weighting restores, against the scene generator's ground truth.

    python tests/curate/reweighting.py --folder /tmp/scenes --out tests/results/reweighting.json
    python tests/curate/reweighting.py --scenes 6000 --folder /tmp/few

The scenes are of the shipped vocabulary. The filter looks for one thing with 50, 100 and 200 labels: half of them
positive and drawn at random, or so for the first 25, and then what `--propose` asks for.
Then 70% of one thing's scenes are removed, and the frequencies of all things are compared before, after, and weighed.
Embeddings stay in --folder, and a run goes on with them; 20,000 scenes take some 10 minutes on 2 cores the first time.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.curate import manifest, reweight
from unclip_jax.curate.filters import Labels, filter_rows, propose
from unclip_jax.data.embed import embed
from unclip_jax.data.embeddings import Embeddings, open_embeddings
from unclip_jax.data.scenes import SceneSource
from unclip_jax.data.vocabulary import SHIPPED
from unclip_jax.embed_command import encoders_of, load_clip

COUNTS = (50, 100, 200)
FILTERED, THINNED, SHARE = ("heart", "dog", "rocket"), ("cat", "pizza", "umbrella"), 0.7


def filter_figures(embeddings: Embeddings, shown: np.ndarray, count: int, active: bool, seed: int) -> dict[str, float]:
    """Precision and recall of the filter on rows that were not labelled."""
    rng = np.random.default_rng(seed)
    start = COUNTS[0] // 2 if active else count
    rows = np.concatenate([rng.choice(np.flatnonzero(shown == value), start // 2, replace=False) for value in (0, 1)])
    with tempfile.TemporaryDirectory() as place:
        for step in range(100):
            labels = Labels(rows, shown[rows])
            out = Path(place) / str(step)
            trained = filter_rows(embeddings, labels, out)
            if len(rows) >= count:
                break
            rows = np.concatenate([rows, propose(embeddings, trained, labels, min(25, count - len(rows)))[0]])
        removed = np.zeros(len(shown), bool)
        logits = trained.probe.logits(embeddings.unit("image", np.arange(len(shown))))
        removed[logits >= trained.probe.threshold] = True
    others = np.setdiff1d(np.arange(len(shown)), rows)
    removed, true = removed[others], shown[others]
    return {"precision": float(true[removed].mean()), "recall": float(removed[true].mean())}


def reweight_figures(embeddings: Embeddings, shows: np.ndarray, thing: int, features: Any) -> dict[str, Any]:
    """The largest relative change of any thing's frequency, filtered and weighed, and that of what was thinned."""
    rng = np.random.default_rng(3)
    gone = np.flatnonzero(shows[:, thing] & (rng.random(len(shows)) < SHARE))
    with tempfile.TemporaryDirectory() as place:
        filtered, out = Path(place) / "filtered", Path(place) / "weights"
        manifest.begin(filtered, "filter", embeddings, {"removes": SHARE}, ())
        manifest.finish(filtered, [{"row": int(row), "key": "", "why": "filter"} for row in gone], {})
        reweight.reweight(embeddings, out, [filtered], features=features)
        reweight.merge(embeddings, out)
        weights = np.array(manifest.load_weights(out / manifest.WEIGHTS))
        kept = manifest.alive(embeddings, [filtered])
    before = shows.mean(0)
    plain, weighed = shows[kept].mean(0) / before - 1, (shows * weights[:, None]).sum(0) / weights.sum() / before - 1
    return {
        "filtered": {"thing": float(plain[thing]), "largest": float(np.abs(plain).max())},
        "weighed": {"thing": float(weighed[thing]), "largest": float(np.abs(weighed).max())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    source = SceneSource("emoji", count=str(options.scenes))
    started = time.perf_counter()
    embed(source, encoders_of(load_clip(None), 256), options.folder / f"scenes-{options.scenes}")
    embeddings = open_embeddings(options.folder / f"scenes-{options.scenes}")
    print(f"embedded in {time.perf_counter() - started:.0f} s", flush=True)
    names = list(SHIPPED)
    shows = np.zeros((options.scenes, len(names)), bool)
    for row in range(options.scenes):
        for item in source.scenes[row].items:
            shows[row, names.index(item.concept.name)] = True
    figures: dict[str, Any] = {"scenes": options.scenes, "filter": {}, "reweighting": {}}
    for thing in THINNED:
        found = {kind: reweight_figures(embeddings, shows, names.index(thing), kind) for kind in ("image", "both")}
        figures["reweighting"][thing] = found
        print(thing, found, flush=True)
    for active in (False, True):
        for count in COUNTS:
            runs = [
                filter_figures(embeddings, shows[:, names.index(thing)], count, active, seed)
                for thing in FILTERED
                for seed in range(options.seeds)
            ]
            name = f"{count} labels, {'proposed' if active else 'half positive'}"
            figures["filter"][name] = {key: round(float(np.mean([run[key] for run in runs])), 4) for key in runs[0]}
            print(name, figures["filter"][name], flush=True)
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
