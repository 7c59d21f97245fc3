"""What the benchmarks of a GPU share: results written as they come, timing, memory, parallel compiles, profiles."""

import gc
import gzip
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

START = time.monotonic()
SLOW = 2.0  # seconds of a run that is repeated less often


class Report:
    """Results so far, rewritten at every new one, and the time that is left."""

    def __init__(self, path: Path, budget: float) -> None:
        self.path, self.budget, self.results = path, budget, {}

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - START)

    def add(self, name: str, **values: Any) -> None:
        values = {key: _rounded(value) for key, value in values.items() if value is not None}
        self.results.setdefault(name, {}).update(values)
        print(f"[{time.monotonic() - START:5.0f} s] {name}: {json.dumps(values)}", flush=True)
        partial_file = self.path.with_suffix(".partial")
        partial_file.write_text(json.dumps(self.results, indent=1) + "\n")
        partial_file.replace(self.path)

    def enough(self, name: str, seconds: float) -> bool:
        """Whether so many seconds are left; says what is skipped where they are not."""
        if self.left < seconds:
            self.add(name, skipped=f"{self.left:.0f} s were left of {self.budget:.0f}")
        return self.left >= seconds


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return [_rounded(item) for item in value] if isinstance(value, list) else value


@partial(jax.jit, static_argnums=(0, 1))
def _drawn(shape: tuple[int, ...], dtype: Any, noise: Any, place: Any, scale: Any, base: Any) -> Any:
    count = int(np.prod(shape))
    repeated = jnp.tile(noise, -(-count // len(noise))) if count > len(noise) else noise
    part = jax.lax.dynamic_slice_in_dim(repeated, place, count)
    return (base + scale * part.reshape(shape)).astype(dtype)


def random_params(shapes: Any, dtype: Any, seed: int = 0) -> Any:
    """Parameters made on the device, none of them constant: kernels by their fan-in, norms about 1, all else about 0.

    Pieces of one pool of noise: a draw of every leaf's own would compile for minutes.
    """
    noise, rng = jax.random.normal(jax.random.key(seed), (2**25,)), np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        name = path[-1].key
        scale = (leaf.shape[-1] / leaf.size) ** 0.5 if name == "kernel" else 0.02
        place = int(rng.integers(0, max(1, len(noise) - leaf.size)))
        return _drawn(leaf.shape, jnp.dtype(dtype), noise, place, scale, float(name == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def timed(run: Callable[[], Any], report: Report, repeats: int = 7) -> list[float]:
    """Seconds of every repeat after two to warm up; one warm-up, and fewer repeats, of what is slow."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    once = time.perf_counter() - start
    if once < SLOW:
        jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats if once < SLOW else 3):
        if seconds and report.left < 2 * once:
            break
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float]) -> dict[str, Any]:
    return {"repeats": len(seconds), "spread_percent": 100 * (max(seconds) - min(seconds)) / statistics.median(seconds)}


def memory(program: Any = None) -> dict[str, Any]:
    """GB on the device: what a program takes, and the most that this process has taken so far."""
    found: dict[str, Any] = {}
    if program is not None and (analysis := program.memory_analysis()) is not None:
        held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        found["program_gb"] = (held + analysis.temp_size_in_bytes) / 1e9
    statistics_of = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics_of:
        found["peak_gb_so_far"] = statistics_of["peak_bytes_in_use"] / 1e9
    return found


class Programs:
    """Lowered here one after another, compiled in parallel; a program that fails is reported and is None."""

    def __init__(self, report: Report, hlo: Path | None) -> None:
        self.report, self.hlo = report, hlo
        self.pool = ThreadPoolExecutor(os.cpu_count())

    def compile(self, lower: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        def finish(lowered: Any) -> tuple[Any, float]:
            start = time.perf_counter()
            return lowered.compile(), time.perf_counter() - start

        futures, programs = {}, {}
        for name, make in lower.items():
            start = time.perf_counter()
            try:
                futures[name] = self.pool.submit(finish, make()), time.perf_counter() - start
            except Exception as error:
                self.report.add(name, failed=_said(error))
        for name, (future, lowering) in futures.items():
            try:
                programs[name], seconds = future.result(max(1.0, self.report.left))
                self.report.add(name, lower_s=lowering, compile_s=seconds, **memory(programs[name]))
            except Exception as error:
                self.report.add(name, failed=_said(error))
            else:
                if self.hlo is not None:
                    self.hlo.mkdir(parents=True, exist_ok=True)
                    text = programs[name].as_text() or ""
                    (self.hlo / f"{name.replace(' ', '_')}.hlo.gz").write_bytes(gzip.compress(text.encode(), 6))
        return programs


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1500]


def kernels(run: Callable[[], Any], top: int = 20) -> dict[str, Any]:
    """Where the device's time goes: milliseconds of the kernels that take most of it, and their number."""
    from jax.profiler import ProfileData

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        data = ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
        taken, count = Counter(), Counter()
        for plane in data.planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    taken[event.name] += event.duration_ns / 1e6
                    count[event.name] += 1
    rows = [f"{ms:8.2f} ms {count[name]:6d} x {name[:110]}" for name, ms in taken.most_common(top)]
    print("\n".join(rows), flush=True)
    return {"kernels_ms": sum(taken.values()), "kernels": count.total(), "top": rows}


def profile(name: str, run: Callable[[], Any], report: Report) -> None:
    try:
        report.add(name, profile=kernels(run))
    except Exception as error:
        report.add(name, no_profile=_said(error))


def guarded(name: str, report: Report, action: Callable[[], None]) -> None:
    """A measurement whose failure (out of memory, say) is reported, and others go on."""
    try:
        action()
    except Exception as error:
        report.add(name, failed=_said(error))
        gc.collect()
