"""The child process of a plan: builds the step, counts it, compiles it; its parent reads what the compiler dumps.

`python -m unclip_jax.plan.worker FOLDER` reads request.json there and writes traced.json, then done.json or failed.txt.
"""

import contextlib
import ctypes
import gc
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

TPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # the compiler needs no backend of its own
    "TPU_SKIP_MDS_QUERY": "1",  # nor a cloud machine's metadata
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second planner dies of the first one's lock
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_COMPILATION_CACHE_DIR": "",  # entries of a compiler without a device cannot be read back
}

GIVE_BACK = 3 * 2**30  # bytes from which on: the compiler has to ask for them again, which takes time

# On v6e the compiler looks long for fusions to merge, a quarter of its time with many pictures on a chip. Memory moves
# by 0.01%; HBM traffic may, of which no time is made. A program that is to run is compiled with it.
UNMERGED = {"xla_jf_enable_advanced_multi_output_fusion": "false"}


def main(folder: Path) -> None:
    """Works the request off; see the module."""
    start = time.monotonic()

    import jax

    from unclip_jax import sharding
    from unclip_jax.plan import flops
    from unclip_jax.plan.request import Request
    from unclip_jax.plan.steps import build_step

    _pass_one_by_one()
    gc.disable()  # a quarter of the time of tracing
    request = Request.from_json(json.loads((folder / "request.json").read_text()))
    devices = _devices(request)
    mesh = sharding.make_mesh(request.strategy, devices)
    batch = request.batch or len(devices)
    step = build_step(request.config, request.clip, request.what, batch, mesh)  # type: ignore[arg-type]
    platform = devices[0].platform
    with sharding.on(mesh):
        traced = step.function.trace(*step.arguments)
        work = flops.count(traced.jaxpr, step.trips)
    taken = _taken(step.arguments, traced.jaxpr)
    facts = {
        "chips": len(devices),
        "kind": devices[0].device_kind,
        "platform": platform,
        "mesh": dict(mesh.shape),
        "places": [list(getattr(device, "coords", ())) for device in mesh.devices.flat],
        "slices": [getattr(device, "slice_index", 0) or 0 for device in mesh.devices.flat],
        "images": step.images,
        "trips": step.trips,
        "parameters": step.parameters,
        "model": work.model,
        "again": work.again,
        "state_bytes": _bytes_per_device(step.arguments[0]),
        "arguments": [name for name, _ in taken],
        "argument_bytes": [size for _, size in taken],
        "seconds": time.monotonic() - start,
    }
    _write(folder / "traced.json", facts)
    if request.depth == "trace":
        return
    with sharding.on(mesh):
        lowered = traced.lower(lowering_platforms=("tpu",)) if platform == "tpu" else traced.lower()
    # The compiler needs the memory that tracing took.
    del traced, work, step
    jax.clear_caches()
    gc.collect()
    options: Any = None
    if platform == "tpu":
        options = {"xla_dump_to": str(folder / "dump"), "xla_dump_hlo_as_text": True}
        options |= UNMERGED if request.depth == "memory" else {}
    compiled = lowered.compile(compiler_options=options)
    memory: Any = compiled.memory_analysis()
    done = {name: getattr(memory, f"{name}_size_in_bytes", 0) for name in ("argument", "output", "temp", "alias")}
    if platform == "tpu":
        from jax.experimental import serialize_executable

        # Kept for a slice of the same chips, jax and libtpu: `deserialize_and_load` there starts at once.
        (folder / "executable").write_bytes(serialize_executable.serialize(compiled)[0])
    else:
        (folder / "program.txt").write_text(compiled.as_text())
    _write(folder / "done.json", {**done, "seconds": time.monotonic() - start})


def _keep_house() -> None:
    """Ends this process soon after its parent, who would read what it finds; gives back what the compiler has freed.

    It frees in small pieces, which the C library keeps: of 3.3 GiB of a step of the 3.5B decoder, 2 were free.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            if _resident() > GIVE_BACK:
                _give_back()
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _resident() -> int:
    """Bytes of memory that this process holds, 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _devices(request: Any) -> list[Any]:
    import jax

    if request.slice is None:
        return jax.devices()
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(**request.slice.request()).devices)


def _pass_one_by_one() -> None:
    """Keeps jax from handing 2000 arguments or more to a TPU as one tuple, where it knows how.

    The program is the same; but the compiler prints the whole tuple beside each of its elements, and its dump of the
    3.5B decoder's step grows by half a gigabyte, on disk and in memory.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import dispatch

        dispatch.should_tuple_args = lambda *_: False


def _taken(arguments: Any, jaxpr: Any) -> list[tuple[str, float]]:
    """What each array that the compiled program takes belongs to, and its bytes on a device; it takes none unread."""
    import jax

    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(arguments)]
    read = {id(variable) for eqn in jaxpr.eqns for variable in eqn.invars} | {id(v) for v in jaxpr.jaxpr.outvars}
    used = [leaf for leaf, variable in zip(leaves, jaxpr.jaxpr.invars, strict=True) if id(variable) in read]
    # A training step takes a state, frozen context, a batch and a key; a sampler parameters and what is drawn from.
    training = any(path.startswith("[0].") for path, _ in leaves)

    def name(path: str) -> str:
        if path.startswith("[0]"):
            return path[4:].split("[")[0].split(".")[0] if training else "params"
        return "context" if training and path.startswith("[1]") else "batch"

    return [(name(path), _bytes_per_device(leaf)) for path, leaf in used]


def _give_back() -> None:
    """Freed memory back to the system, where the C library knows how."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _bytes_per_device(tree: Any) -> float:
    import jax

    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(values))
    partial.replace(path)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    _keep_house()
    try:
        main(place)
    except Exception as error:  # the parent tells the user
        (place / "failed.txt").write_text(f"{type(error).__name__}\n{error}")
        if os.environ.get("UNCLIP_DEBUG"):
            raise
        sys.exit(1)
