"""Full-size Karlo with random weights: written, read in fresh processes, and its anonymous memory measured.

python tests/interop/full_size_karlo.py FOLDER [--tiny] [--dtypes float32 bfloat16] [--keep]

Writes 13.7 GB (3,422,157,516 numbers in float32) to FOLDER and deletes it at the end unless --keep is given; a folder
that is there already is measured, and stays. Run it with nothing else running. No part of the tests: pytest does not
collect it. Exits with 1 where a count differs or anonymous memory exceeds 1.3 times the loaded parameters.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout that the script is part of

import jax
import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.checkpoint import Network
from unclip_jax.checkpoint.writing import Tensor
from unclip_jax.config import ClipConfig, TrainConfig, TransformerConfig
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.interop.clip import text_shapes
from unclip_jax.interop.exporting import export_cascade
from unclip_jax.interop.folder import load_folders
from unclip_jax.interop.inspecting import inspect, table
from unclip_jax.overrides import load_config
from unclip_jax.stages import build

LIMIT = 1.3  # anonymous memory over the size of the loaded parameters
COUNTS = {  # numbers and tensors in the published files
    "text_encoder": (123_650_304, 197),
    "prior": (1_022_030_080, 338),
    "text_proj": (7_878_400, 11),
    "decoder": (885_439_686, 716),
    "super_res_first": (691_579_523, 408),
    "super_res_last": (691_579_523, 408),
}


def configs(tiny: bool) -> dict[str, TrainConfig]:
    runs = {name: load_config(f"karlo_{name}") for name in ("clip", "prior", "decoder", "up256")}
    networks: dict[str, Any] = {name: run.network for name, run in runs.items()}
    networks["up256"] = replace(networks["up256"], last_step=True)
    if tiny:
        small = TransformerConfig(48, 2, 4, activation="quick_gelu", causal=True)
        networks["clip"] = replace(networks["clip"], text=small, embedding_dim=48)
        prior = TransformerConfig(64, 2, 4, causal=True)
        networks["prior"] = replace(networks["prior"], embedding_dim=48, text_dim=48, transformer=prior)
        changes: dict[str, Any] = {"channels": 32, "depth": 1, "head_channels": 16}
        unet = replace(networks["decoder"].unet, **changes, context_dim=64)
        networks["decoder"] = replace(networks["decoder"], unet=unet, image_embedding_dim=48, text_dim=48)
        networks["up256"] = replace(networks["up256"], unet=replace(networks["up256"].unet, **changes))
    return {name: replace(run, network=networks[name]) for name, run in runs.items()}


def random_cascade(runs: dict[str, TrainConfig]) -> Cascade:
    """Networks whose parameters are drawn when they are written."""
    rng, clip = np.random.default_rng(0), runs["clip"].network
    assert isinstance(clip, ClipConfig)

    def drawn(leaf: Any) -> Tensor:
        return Tensor(leaf.shape, np.dtype(np.float32), lambda: rng.standard_normal(leaf.shape, np.float32) * 0.02)

    def network(name: str, constants: Any = None) -> Network:
        shapes: Any = text_shapes(clip)
        if name != "clip":
            shapes = jax.eval_shape(build(runs[name], clip).init, jax.random.key(0))
        return Network(runs[name], jax.tree.map(drawn, dict(shapes)), constants or {}, None, "", {})

    z = (clip.embedding_dim,)
    whitening = {"mean": np.zeros(z, np.float32), "std": np.ones(z, np.float32)}
    parts = network("clip"), network("prior", {"whitening": whitening}), network("decoder"), (network("up256"),)
    return Cascade(ClipTokenizer(clip.context_length), *parts, ())


def anonymous() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def watched(action: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What an action gives, and what it took: bytes of anonymous memory before and at the peak, and seconds."""
    jax.block_until_ready(jax.numpy.arange(8.0))
    before, seen, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(anonymous())
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    try:
        result = action()
    finally:
        done.set()
        thread.join()
    return result, {"before": before, "peak": max(*seen, anonymous()), "seconds": time.perf_counter() - start}


def measure(folder: Path, dtype: Any) -> dict[str, float]:
    """What loading takes, in this process."""
    cascade, taken = watched(lambda: load_folders([folder], dtype))
    networks = (cascade.clip, cascade.prior, cascade.decoder, *cascade.upsamplers)
    leaves = [leaf for network in networks for leaf in jax.tree.leaves(network.params)]
    return taken | {"numbers": sum(leaf.size for leaf in leaves), "parameters": sum(leaf.nbytes for leaf in leaves)}


def _gigabytes(taken: dict[str, float]) -> str:
    return f"{taken['before'] / 1e9:.3f} GB before, {taken['peak'] / 1e9:.3f} GB at most"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="small networks, to see that the script works")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder, options.measure)))
        return 0
    failures, new = [], not options.folder.exists()
    if new:
        _, taken = watched(lambda: export_cascade(random_cascade(configs(options.tiny)), options.folder))
        print(f"written in {taken['seconds']:.1f} s; RssAnon {_gigabytes(taken)}")
    report = inspect(options.folder)
    print(table(report), "", sep="\n")
    if report.verdict != "yes":
        failures.append(report.verdict)
    found = {row.component: (row.parameters, row.tensors) for row in report.rows}
    if not options.tiny and found != COUNTS:
        failures.append(f"counts {found}, expected {COUNTS}")
    for dtype in options.dtypes:
        command = [sys.executable, __file__, str(options.folder), "--measure", dtype]
        taken = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratio, own = (taken["peak"] / taken["parameters"], (taken["peak"] - taken["before"]) / taken["parameters"])
        print(
            f"{dtype}: {taken['numbers']:,} numbers, {taken['parameters'] / 1e9:.3f} GB in {taken['seconds']:.1f} s; "
            f"RssAnon {_gigabytes(taken)}: {ratio:.3f} times the parameters, {own:.3f} without what stood before"
        )
        if not options.tiny and ratio > LIMIT:
            failures.append(f"{dtype} takes {ratio:.3f} times its parameters, more than {LIMIT}")
    if new and not options.keep:
        shutil.rmtree(options.folder)
    for failure in failures:
        print(f"FAILED: {failure}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
