"""Our FID beside pytorch-fid's: same random weights, same pictures; features, distances and speed in one run.

    pip install --no-deps --target oracle pytorch-fid torchvision==0.28.0    # of torch 2.13
    PYTHONPATH=oracle python tests/evaluate/beside_pytorch_fid.py --out tests/results/fid.json

torchvision changes what transformers does with pictures, so it stays out of the environment of the tests.
"""

import argparse
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from degradations import degraded, rises
from pytorch_fid.fid_score import calculate_frechet_distance
from pytorch_fid.inception import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2, InceptionV3
from torch_inception import randomised
from torchvision.models import inception_v3

from unclip_jax import compile_cache
from unclip_jax.data.emoji import Renderer, Scenes
from unclip_jax.evaluate.distances import frechet, moments_of
from unclip_jax.evaluate.features import inception_eye, look
from unclip_jax.evaluate.inception import load_inception
from unclip_jax.evaluate.report import versions
from unclip_jax.sharding import make_mesh


def published_architecture():
    """What pytorch_fid.inception.fid_inception_v3 builds, without fetching weights."""
    network = inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    network.Mixed_5b, network.Mixed_5c = FIDInceptionA(192, pool_features=32), FIDInceptionA(256, pool_features=64)
    network.Mixed_5d, network.Mixed_6b = FIDInceptionA(288, pool_features=64), FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c, network.Mixed_6d = FIDInceptionC(768, channels_7x7=160), FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e, network.Mixed_7b = FIDInceptionC(768, channels_7x7=192), FIDInceptionE_1(1280)
    network.Mixed_7c = FIDInceptionE_2(2048)
    return network


def speeds(eyes, pictures, batch):
    """Pictures a second of each, batch by batch in turn, so that both see the same machine; and the features."""
    found, seconds = {name: [] for name in eyes}, {name: [] for name in eyes}
    for see in eyes.values():
        see(pictures[:batch])  # compiles, and takes memory
    for start in range(0, len(pictures), batch):
        for name, see in eyes.items():
            begin = time.perf_counter()
            found[name].append(see(pictures[start : start + batch]))
            seconds[name].append(time.perf_counter() - begin)
    return {name: batch / float(np.median(times)) for name, times in seconds.items()}, found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=32, help="in each set")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--halves", type=int, default=1024, help="pictures in each half whose distance is to be small")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import pytorch_fid.inception

    compile_cache.enable()
    weights = randomised(published_architecture())
    pytorch_fid.inception.fid_inception_v3 = lambda: weights
    network = InceptionV3([3]).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pth"
        torch.save(weights.state_dict(), path)
        eye = inception_eye(load_inception(path), make_mesh("dp"))

    def theirs(pictures):
        with torch.no_grad():
            pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
            return network(pixels)[0][:, :, 0, 0].numpy()

    scenes, renderer = Scenes(split="held_out"), Renderer()
    renders = np.stack([renderer.render(scenes[i]) for i in range(2 * options.pictures)])
    half = options.pictures // options.batch * options.batch
    sets = degraded(renders[:half], renders[half : 2 * half])
    both = np.concatenate([sets["the same"], sets["as many others"]])
    rates, found = speeds({"unclip_jax": eye.see, "pytorch-fid": theirs}, both, options.batch)
    ours, other = (np.concatenate(found[name]).astype(np.float64) for name in rates)
    facts = [fact for part in (other[:half], other[half:]) for fact in (part.mean(0), np.cov(part, rowvar=False))]
    real = moments_of(ours[:half])
    figures = {"the same": {"FID": frechet(real, real)}}
    figures["as many others"] = {"FID": frechet(real, moments_of(ours[half:]))}
    for name, pictures in list(sets.items())[2:]:
        figures[name] = {"FID": frechet(real, look(eye, pictures, options.batch, name).moments)}
    content = {
        "weights": "InceptionV3's architecture with random weights: what is shown is the mathematics, not FID's scale",
        "pictures": f"{half} held-out renders in each set, at 64 px, in batches of {options.batch}",
        "processor": f"{os.cpu_count()} cores",
        "largest difference of features": float(np.abs(ours - other).max()),
        "largest feature": float(np.abs(other).max()),
        "FID of two halves": {
            "unclip_jax": figures["as many others"]["FID"],
            "pytorch-fid": float(calculate_frechet_distance(*facts)),
        },
        "pictures per second": rates,
        "FID": {name: row["FID"] for name, row in figures.items()},
        "rises with": {kind: columns["FID"] for kind, columns in rises(figures).items()},
        "versions": versions() | {name: version(name) for name in ("torch", "torchvision", "pytorch-fid")},
    }
    # A distance of n pictures to as many others falls as 1 / n.
    many = np.stack([renderer.render(scenes[i]) for i in range(2 * options.halves)])
    halves = [look(eye, part, options.batch, "a half").moments for part in np.split(many, 2)]
    content[f"FID of two halves of {options.halves}"] = frechet(*halves)
    text = json.dumps(content, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
