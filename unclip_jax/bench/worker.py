"""The process of one case: compiles the training step and times it, on pictures and captions that are noise.

`python -m unclip_jax.bench.worker FOLDER` reads request.json there, and writes answer.json or refused.txt.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unclip_jax.bench.cases import Case, Here, config_of
from unclip_jax.checkpoint.schema import from_json
from unclip_jax.config import ArPriorConfig, ClipConfig, DecoderConfig, PriorConfig, TrainConfig, UpsamplerConfig
from unclip_jax.plan.steps import loss_shapes
from unclip_jax.sharding import check_batch_size, make_mesh, on, put_batch, shard_state, slices_of
from unclip_jax.stages import build
from unclip_jax.train import init_state, jitted_step
from unclip_jax.types import Batch


def here() -> Here:
    """The devices of this process."""
    devices = jax.devices()
    return Here(len(devices), devices[0].device_kind, devices[0].platform, slices_of(devices))


def measure(config: TrainConfig, clip: ClipConfig | None, case: Case, steps: int, warmup: int) -> dict[str, Any]:
    """Figures of a case's training step; times in seconds, memory in bytes of the device that holds most.

    A step is timed from the end of the one before, with one dispatched ahead, as training runs; reading data is left
    out. Raises ValueError where mesh, batch and network do not go together.
    """
    config, devices = config_of(config, case), jax.devices()[: case.devices]
    mesh = make_mesh(case.strategy, devices)
    check_batch_size(case.batch, mesh, config.optim.accumulate)
    stage = build(config, clip)
    state = init_state(config, stage, mesh)
    context, batch = synthetic(config, clip)
    context = jax.device_put(context, shard_state(context, mesh, strict=False))
    batch, key = put_batch(batch, mesh), jax.random.key(config.seed + 1)
    held = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
    state_bytes = max(sum(shard.data.nbytes for shard in held if shard.device == device) for device in devices)
    row: dict[str, Any] = {
        "mesh": dict(mesh.shape),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "state_bytes": state_bytes,
    }
    del held
    ends = []
    with on(mesh):
        begun = time.perf_counter()
        lowered = jitted_step(config, stage, mesh).lower(state, context, batch, key)
        traced = time.perf_counter()
        step = lowered.compile()
        row |= {"trace_seconds": traced - begun, "compile_seconds": time.perf_counter() - traced}
        previous = None
        for _ in range(warmup + steps + 1):
            state, metrics = step(state, context, batch, key)
            if previous is not None:
                jax.block_until_ready(previous)
                ends.append(time.perf_counter())
            previous = metrics["loss"]
        jax.block_until_ready(state)
    low, median, high = np.percentile(np.diff(ends)[-steps:], (10, 50, 90)).tolist()
    row |= {"step_median": median, "step_p10": low, "step_p90": high, "images_per_second": case.batch / median}
    memory: Any = step.memory_analysis()
    sizes = {name: getattr(memory, f"{name}_size_in_bytes", 0) for name in ("argument", "output", "temp", "alias")}
    compiled = sizes["argument"] + sizes["output"] + sizes["temp"] - sizes["alias"]
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    known = [peak for peak in peaks if peak]
    measured = {"memory_bytes": max(known, default=compiled), "memory_from": "device" if known else "compiler"}
    return row | measured | {"compiled_bytes": compiled}


def synthetic(config: TrainConfig, clip: ClipConfig | None) -> tuple[Any, Batch]:
    """Noise in place of the frozen trees and of a batch, of the shapes that training has.

    Embeddings are stored ones only where the config says so (data.stored, or a source of them); else the frozen CLIP
    computes them in the step.
    """
    data, network = config.data, config.network
    _, context, batch, _ = loss_shapes(config, clip, data.batch_size)
    prior = isinstance(network, PriorConfig | ArPriorConfig)
    if batch.embedding is not None and not ("stored:" in data.source or (data.stored and prior)):
        side = data.crop or data.size
        image = jax.ShapeDtypeStruct((data.batch_size, side, side, 3), np.uint8)
        batch = batch._replace(image=image, embedding=None)
    rng = np.random.default_rng(config.seed)
    readers = [part for part in (network, clip) if isinstance(part, ClipConfig | DecoderConfig | UpsamplerConfig)]
    words = min(part.vocab_size for part in readers)

    def fill(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        match str(getattr(path[-1], "key", getattr(path[-1], "name", ""))), np.dtype(leaf.dtype).kind:
            case "std" | "high", _:
                return np.ones(leaf.shape, leaf.dtype)
            case "low", "f":
                return -np.ones(leaf.shape, leaf.dtype)
            case "buckets", _:
                return np.full(leaf.shape, network.buckets if isinstance(network, ArPriorConfig) else 1, leaf.dtype)
            case _, "u":
                return rng.integers(0, 256, leaf.shape, leaf.dtype)
            case _, "i":
                return rng.integers(0, words, leaf.shape, leaf.dtype)
            case _, "b":
                return np.ones(leaf.shape, bool)
        return np.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, (context, batch))


def main(folder: Path) -> None:
    """Works the request off; see the module."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    if request["cpu_devices"]:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", request["cpu_devices"])
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is measured
    answer: Any = here()._asdict()
    if request["case"] is not None:
        config, clip = (part and from_json(part) for part in (request["config"], request["clip"]))
        answer = measure(config, clip, Case(**request["case"]), request["steps"], request["warmup"])
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _end_with_parent() -> None:
    """Ends this process when its parent, which holds the other end of standard input, has gone."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        main(place)
    except Exception as error:  # becomes a row
        (place / "refused.txt").write_text(f"{type(error).__name__}\n{error}", encoding="utf-8")
        sys.exit(1)
