"""Do the scores rank the checkpoints of one training run as training does? Six of them, log-spaced, fixed beforehand.

    python tests/evaluate/checkpoint_ranking.py runs/ranking --train emoji_decoder --steps 6400   # trains, measures
    python tests/evaluate/checkpoint_ranking.py runs/ranking                                      # measures

FOLDER holds decoder-<steps>.safetensors, exported by --train at steps, steps / 2, ... steps / 32 of one run on the CLIP
of the cascade that ships, whose other networks draw with each of them. Leaves rows and ranking.json in FOLDER.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from unclip_jax import compile_cache
from unclip_jax.cascade import SHIPPED, load_cascade, load_checked
from unclip_jax.config import DecoderConfig
from unclip_jax.evaluate.distances import frechet
from unclip_jax.evaluate.faithfulness import judge_of
from unclip_jax.evaluate.features import clip_eye, embed_captions, look
from unclip_jax.evaluate.pairs import HELD_OUT, read_pairs
from unclip_jax.evaluate.quality import Ruler
from unclip_jax.evaluate.report import versions
from unclip_jax.evaluate.sweep import Task, run_sweep, settings_of
from unclip_jax.inputs import Options
from unclip_jax.overrides import load_config
from unclip_jax.run import train
from unclip_jax.sharding import make_mesh

HALVINGS = 5
SCORES = {"faithfulness": 1, "CLIP score": 1, "retrieval": 1, "CMMD": -1, "FD": -1}  # and which way they improve


def spearman(a, b):
    """Correlation of ranks; equal values share their mean rank."""

    def ranks(values):
        values = np.asarray(values, float)
        return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def train_in_legs(folder, name, steps):
    """One run, interrupted and resumed at the chosen steps, where its decoder is copied."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "clip.safetensors").exists():
        shutil.copy(SHIPPED / "clip.safetensors", folder)
    for halving in range(HALVINGS, -1, -1):
        reached = steps // 2**halving
        copy = folder / f"decoder-{reached:06d}.safetensors"
        if not copy.exists():
            config = replace(load_config(name), steps=reached, keep_best=0)
            train(config, folder, make_mesh(config.strategy))
            shutil.copy(folder / "decoder.safetensors", copy)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", metavar="CONFIG", help="train a decoder of this config first")
    parser.add_argument("--steps", type=int, default=6400, help="of the last checkpoint")
    parser.add_argument("--n", type=int, default=256, help="held-out captions")
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    compile_cache.enable()
    if options.train:
        train_in_legs(options.folder, options.train, options.steps)
    cascade = load_cascade()
    pairs = read_pairs(cascade, HELD_OUT, options.n, cascade.sizes[0])
    eye = clip_eye(cascade.clip, make_mesh("dp"))
    text = embed_captions(cascade.clip, pairs.captions, cascade.tokenizer)
    ruler = Ruler(pairs, eye, text, look(eye, pairs.pictures), judge_of(cascade))
    assert frechet(ruler.real.moments, ruler.real.moments) < 1e-6
    task = Task(("faithfulness", "clip", "retrieval", "fd", "cmmd"), options.folder / "measured", batch=options.batch)
    rows = []
    for path in sorted(options.folder.glob("decoder-*.safetensors")):
        decoder = load_checked(path, DecoderConfig, cascade.clip)
        # Configs differ in the steps alone; one for all of them shares the compiled programs.
        shared = replace(decoder.config, steps=0)
        own = cascade._replace(decoder=decoder._replace(config=shared))
        (row,) = run_sweep(own, ruler, task, settings_of(own, Options(size=cascade.sizes[0]), []))
        rows.append({"steps": decoder.extra["steps"], **row})
        print(json.dumps({"steps": rows[-1]["steps"], **row["figures"]}), flush=True)
    if len(rows) < 3:
        parser.error(f"'{options.folder}' holds {len(rows)} decoders, which is no ranking: --train CONFIG makes six")
    steps = [row["steps"] for row in rows]
    ranking = {name: spearman(steps, [sign * row["figures"][name] for row in rows]) for name, sign in SCORES.items()}
    content = {"spearman": ranking, "rows": rows, "versions": versions()}
    (options.folder / "ranking.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(ranking, indent=1))


if __name__ == "__main__":
    main()
