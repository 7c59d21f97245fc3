"""Distances of held-out renders to themselves, to other renders, and to ever more blurred and noisier copies.

    python tests/evaluate/degradations.py --n 512 [--inception pt_inception-2015-12-05-6726825d.pth] --out curve.json

Without a file, FID's column is that of InceptionV3 with random weights: it shows the mathematics, not FID's scale.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from unclip_jax import compile_cache
from unclip_jax.cascade import load_cascade
from unclip_jax.evaluate.distances import cmmd, frechet
from unclip_jax.evaluate.features import clip_eye, inception_eye, look
from unclip_jax.evaluate.inception import Inception, expected_shapes, fold, load_inception
from unclip_jax.evaluate.pairs import HELD_OUT, read_pairs
from unclip_jax.evaluate.report import table, versions
from unclip_jax.sharding import make_mesh

BLURS, NOISES = (0.25, 0.5, 1.0, 2.0), (2, 5, 10, 20, 40)  # px and levels, standard deviations


def random_inception():
    rng = np.random.default_rng(0)

    def tensor(name, shape):
        if len(shape) == 4:
            return rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        return rng.normal(1 if name.endswith(("bn.weight", "running_var")) else 0, 0.1, shape)

    return Inception(fold({name: tensor(name, shape) for name, shape in expected_shapes().items()}), "random")


def degraded(real, other):
    """The pictures themselves, others, and the pictures ever more blurred and noisier, by name."""
    rng, sets = np.random.default_rng(0), {"the same": real, "as many others": other}
    for sigma in BLURS:
        blurred = [np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(sigma))) for x in real]
        sets[f"blur {sigma:g} px"] = np.stack(blurred)
    for sigma in NOISES:
        sets[f"noise {sigma}"] = np.clip(real + rng.normal(0, sigma, real.shape), 0, 255).astype(np.uint8)
    return sets


def rises(figures):
    """Whether every column rises from row to row, with blur and with noise."""
    found = {}
    for kind in ("blur", "noise"):
        rows = [row for name, row in figures.items() if name.startswith(kind)]
        pairs = list(zip(rows, rows[1:], strict=False))
        found[kind] = {column: all(a[column] < b[column] for a, b in pairs) for column in rows[0]}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--inception", type=Path)
    parser.add_argument("--no-inception", action="store_true", help="in CLIP's space alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    compile_cache.enable()
    cascade, mesh = load_cascade(), make_mesh("dp")
    eyes = {"CLIP": clip_eye(cascade.clip, mesh)}
    if not options.no_inception:
        weights = load_inception(options.inception) if options.inception else random_inception()
        eyes["FID" if options.inception else "random Inception"] = inception_eye(weights, mesh)
    real, other = (read_pairs(cascade, HELD_OUT, options.n, 64, first).pictures for first in (0, options.n))
    sets = degraded(real, other)
    figures = {name: {} for name in sets}
    for eye_name, eye in eyes.items():
        seen = {name: look(eye, pictures, 64, f"{eye_name}, {name}") for name, pictures in sets.items()}
        for name, found in seen.items():
            figures[name][f"{eye_name}, FD"] = frechet(seen["the same"].moments, found.moments)
            if eye_name == "CLIP":
                figures[name]["CMMD"] = cmmd(seen["the same"].features, found.features)
    print(table(figures))
    for kind, columns in rises(figures).items():
        print(f"rising with {kind}: {columns}")
    if options.out:
        content = {"n": options.n, "figures": figures, "versions": versions()}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
