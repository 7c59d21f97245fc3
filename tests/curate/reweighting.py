"""What re-weighting restores, and what the filter finds with few labels, against the scene generator's ground truth.

    python tests/curate/reweighting.py --folder /tmp/scenes --out tests/results

The scenes are of the shipped vocabulary. 70% of one thing's scenes are removed, and the frequencies of all things are
compared before, after, weighed, and in an epoch of the loader's own order under these weights. The filter looks for one
thing with 50, 100 and 200 labels: half of them positive and drawn at random, or so for the first 50, and then what
`--propose` asks for. Every setting of both was chosen on the things dog, heart, rocket, banana, panda and fish, which
are not among those that are reported. Embeddings stay in --folder, and a run goes on with them; 20,000 scenes take
1 to 5 minutes on 2 cores the first time, and all else some 20 minutes.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.curate import manifest, reweight
from unclip_jax.curate.features import Features, features_of
from unclip_jax.curate.filters import Labels, filter_rows, propose
from unclip_jax.data.embed import embed
from unclip_jax.data.embeddings import Embeddings, open_embeddings
from unclip_jax.data.order import make_order
from unclip_jax.data.scenes import SceneSource
from unclip_jax.data.vocabulary import SHIPPED
from unclip_jax.embed_command import encoders_of, load_clip

COUNTS = (50, 100, 200)
THINGS, SHARE = ("umbrella", "cat", "pizza", "apple", "house", "turtle"), 0.7
Figures = dict[str, float]


def reweight_figures(embeddings: Embeddings, shows: np.ndarray, thing: int, features: Features, seed: int) -> Figures:
    """Relative changes of frequencies: of what was thinned, and the largest of any other thing."""
    gone = np.flatnonzero(shows[:, thing] & (np.random.default_rng([3, seed]).random(len(shows)) < SHARE))
    with tempfile.TemporaryDirectory() as place:
        filtered, out = Path(place) / "filtered", Path(place) / "weights"
        manifest.begin(filtered, "filter", embeddings, {"removes": SHARE}, ())
        manifest.finish(filtered, [{"row": int(row), "key": "", "why": "filter"} for row in gone], {})
        reweight.reweight(embeddings, out, [filtered], features=features, seed=seed)
        share = reweight.merge(embeddings, out)["effective_share"]
        weights = np.array(manifest.load_weights(out / manifest.WEIGHTS), np.float64)
        kept = manifest.alive(embeddings, [filtered])
    order = make_order(seed, (len(shows),), weights=weights)
    seen = np.bincount([order(row) for row in range(len(shows))], minlength=len(shows))
    figures: Figures = {"effective_share": round(share, 4)}
    for name, counts in (("filtered", kept.astype(int)), ("weighed", weights), ("loaded", seen)):
        change = counts @ shows / counts.sum() / shows.mean(0) - 1
        figures[name] = round(float(change[thing]), 4)
        figures[f"{name}_largest_other"] = round(float(np.abs(np.delete(change, thing)).max()), 4)
    return figures


def filter_figures(
    embeddings: Embeddings, shown: np.ndarray, active: bool, features: Features, seed: int
) -> Iterator[tuple[int, Figures]]:
    """Precision and recall of the filter on rows that were not labelled, by the number of labels."""
    rng, rows = np.random.default_rng(seed), np.zeros(0, np.int64)
    everything = features_of(embeddings, np.arange(len(shown)), features)
    for count in COUNTS:
        if not active or not len(rows):
            halves = [rng.choice(np.flatnonzero(shown == value), count // 2, replace=False) for value in (0, 1)]
            rows = np.concatenate(halves)
        while True:
            labels = Labels(rows, shown[rows])
            with tempfile.TemporaryDirectory() as place:
                trained = filter_rows(embeddings, labels, Path(place), features=features, seed=seed)
            if len(rows) >= count:
                break
            rows = np.concatenate([rows, propose(embeddings, trained, labels, min(50, count - len(rows)))[0]])
        others = np.setdiff1d(np.arange(len(shown)), rows)
        removed, true = (trained.probe.logits(everything) >= trained.probe.threshold)[others], shown[others]
        yield count, {"precision": float(true[removed].mean()), "recall": float(removed[true].mean())}


def summary(runs: list[Figures]) -> dict[str, list[float]]:
    """Mean, least and largest of every figure."""
    columns = {name: np.asarray([run[name] for run in runs]) for name in runs[0]}
    return {name: [round(float(f(values)), 4) for f in (np.mean, np.min, np.max)] for name, values in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--things", nargs="+", default=THINGS)
    parser.add_argument("--features", nargs="+", default=("both", "image"))
    parser.add_argument("--only", choices=("reweighting", "filter"))
    parser.add_argument("--out", type=Path, help="folder of reweighting.json and filter.json")
    options = parser.parse_args()
    source = SceneSource("emoji", count=str(options.scenes))
    embed(source, encoders_of(load_clip(None), 256), options.folder / f"scenes-{options.scenes}")
    embeddings = open_embeddings(options.folder / f"scenes-{options.scenes}")
    names = list(SHIPPED)
    shows = np.zeros((options.scenes, len(names)), bool)
    for row in range(options.scenes):
        for item in source.scenes[row].items:
            shows[row, names.index(item.concept.name)] = True
    about = {"scenes": options.scenes, "things": list(options.things), "seeds": options.seeds}
    found: dict[str, Any] = {"reweighting": {}, "filter": {}}

    def save(name: str) -> None:
        if options.out:
            (options.out / f"{name}.json").write_text(json.dumps(about | found[name], indent=1) + "\n")

    for features in options.features if options.only != "filter" else ():
        for thing in options.things:
            runs = [reweight_figures(embeddings, shows, names.index(thing), features, n) for n in range(options.seeds)]
            found["reweighting"].setdefault(features, {})[thing] = runs
            print(features, thing, [(run["filtered"], run["weighed"], run["loaded"]) for run in runs], flush=True)
            save("reweighting")
    for features in options.features if options.only != "reweighting" else ():
        for active in (False, True):
            rows: dict[int, list[Figures]] = {count: [] for count in COUNTS}
            for thing in options.things:
                for seed in range(options.seeds):
                    for count, figures in filter_figures(
                        embeddings, shows[:, names.index(thing)], active, features, seed
                    ):
                        rows[count].append(figures)
            for count in COUNTS:
                name = f"{count} labels, {'proposed after 50' if active else 'half positive'}"
                found["filter"].setdefault(features, {})[name] = summary(rows[count])
                print(features, name, found["filter"][features][name], flush=True)
            save("filter")


if __name__ == "__main__":
    main()
