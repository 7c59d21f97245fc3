"""Our FID beside pytorch-fid's: same random weights, same pictures; features, distance and speed in one run.

    pip install --no-deps --target oracle pytorch-fid torchvision==0.28.0    # of torch 2.13
    PYTHONPATH=oracle:tests/evaluate python tests/evaluate/beside_pytorch_fid.py --pictures 64

torchvision changes what transformers does with pictures, so it stays out of the environment of the tests.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pytorch_fid.fid_score import calculate_frechet_distance
from pytorch_fid.inception import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2, InceptionV3
from torch_inception import randomised
from torchvision.models import inception_v3

from unclip_jax.data.emoji import Renderer, Scenes
from unclip_jax.evaluate.distances import frechet, moments_of
from unclip_jax.evaluate.features import inception_eye
from unclip_jax.evaluate.inception import load_inception
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    import pytorch_fid.inception

    weights = randomised(published_architecture())
    pytorch_fid.inception.fid_inception_v3 = lambda: weights
    network = InceptionV3([3]).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pth"
        torch.save(weights.state_dict(), path)
        eye = inception_eye(load_inception(path), make_mesh("dp"))
    scenes, renderer = Scenes(split="held_out"), Renderer()
    real = np.stack([renderer.render(scenes[i]) for i in range(2 * options.pictures)])
    found, seconds = {"torch": [], "jax": []}, {"torch": 0.0, "jax": 0.0}
    eye.see(real[: options.batch])  # compiles
    for start in range(0, len(real), options.batch):
        part = real[start : start + options.batch]
        begin = time.perf_counter()
        found["jax"].append(eye.see(part))
        seconds["jax"] += time.perf_counter() - begin
        begin = time.perf_counter()
        with torch.no_grad():
            pixels = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 255
            found["torch"].append(network(pixels)[0][:, :, 0, 0].numpy())
        seconds["torch"] += time.perf_counter() - begin
    ours, other = (np.concatenate(found[name]).astype(np.float64) for name in ("jax", "torch"))
    half = len(real) // 2
    theirs = [fact for part in (other[:half], other[half:]) for fact in (part.mean(0), np.cov(part, rowvar=False))]
    published = calculate_frechet_distance(*theirs)
    mine = frechet(moments_of(ours[:half]), moments_of(ours[half:]))
    print(json.dumps({
        "largest difference of features": float(np.abs(ours - other).max()),
        "largest feature": float(np.abs(other).max()),
        "FID of two halves, ours": mine, "pytorch-fid's": float(published),
        "identical sets": frechet(moments_of(ours), moments_of(ours)),
        "pictures/s, ours": len(real) / seconds["jax"], "pytorch-fid's pictures/s": len(real) / seconds["torch"],
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
