"""Kills training processes at random moments, starts them again, and compares with a run that nothing interrupted.

    python tests/kill_matrix.py --processes 2 --kills 40 --out kills.json
    python tests/kill_matrix.py --processes 4 --kills 10 --restore 1 2 8

The processes train one tiny network, whose parameters are split over them, on one machine with CPU collectives. Killed
with SIGKILL are one of them or all: while they start, in a step, or in a save. Those that are left have to end by
themselves. Then the log, the whole training state and the exported average must equal the other run's bit for bit;
--restore reads the checkpoint on so many devices of one process.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

# Before jax is imported, which every process inherits.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
os.environ["OMP_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import compile_cache
from unclip_jax.checkpoint.store import Store, restore_params_numpy
from unclip_jax.config import ClipConfig, DataConfig, OptimConfig, TrainConfig
from unclip_jax.hosts import Hosts, is_first, together, whole
from unclip_jax.preemption import Preempted
from unclip_jax.preflight import facts_of
from unclip_jax.sharding import host_rows, make_mesh, shard_state
from unclip_jax.train import fit, init_state
from unclip_jax.types import Batch, Stage

BATCH, WIDTH = 8, 128  # the square of the width is the least that is split over processes
TIMEOUT = 30.0  # seconds until a silent host counts as gone, and that a busy machine may start them apart
TIMED = ("images_per_second", "data_stall")  # metrics that no run repeats
STARTING = 6.0  # seconds in which a start is struck
SLOW = 0.03  # seconds that a batch takes, so that moments lie in steps
CONFIG = TrainConfig(
    "killed",
    ClipConfig(),
    data=DataConfig(batch_size=BATCH),
    optim=OptimConfig(learning_rate=1e-2, warmup=2, ema=0.9),
    strategy="fsdp",
    log_every=1,
    save_every=3,
    preview_every=10**6,
)


def init(key: Any) -> Any:
    return {"layer": {"kernel": jax.random.normal(key, (WIDTH, WIDTH)) / 12, "bias": jnp.zeros(WIDTH)}}


def loss(params: Any, context: Any, batch: Batch, key: Any) -> Any:
    x = batch.image[:, :, 0, 0].astype(jnp.float32) / 255
    guess = jnp.tanh(x @ params["layer"]["kernel"] + params["layer"]["bias"])
    kept = jax.random.bernoulli(key, 0.9, guess.shape)
    return jnp.mean((guess * kept - x[:, ::-1]) ** 2), {"guess": guess.mean()}


def preview(params: Any, context: Any, batch: Batch, keys: Any) -> Any:
    change = (1e4 * params["layer"]["bias"]).astype(jnp.uint8)
    return batch.image + change[None, :, None, None]


STAGE = Stage(init, loss, preview)


def stream(own: Any, slow: float, start: int) -> Iterator[Batch]:
    for step in count(start):
        time.sleep(slow)
        image = np.random.default_rng([7, step]).integers(0, 256, (BATCH, WIDTH, 1, 1), np.uint8).repeat(3, -1)
        yield Batch(image[own], np.ones((len(own), 2), np.int32), np.ones((len(own), 2), bool))  # type: ignore[arg-type]


def train(folder: Path, steps: int, slow: float, hosts: Hosts) -> None:
    """One process of the training."""
    log = (folder / f"host{hosts.index}.log").open("a")
    for stream_number in (1, 2):
        os.dup2(log.fileno(), stream_number)
    compile_cache.enable(folder.parent / "compiled")
    config = replace(CONFIG, steps=steps)
    try:
        with together(hosts, facts_of(config), folder, TIMEOUT) as watchdog:
            mesh = make_mesh(config.strategy)
            read = partial(stream, host_rows(mesh, BATCH), slow)
            state = whole(fit(config, STAGE, {}, read, mesh, folder, watchdog=watchdog))
            if is_first():
                np.savez(folder / "state.npz", *map(np.asarray, jax.tree.leaves(state)))
    except Preempted as stopped:
        sys.exit(stopped.code)


def child(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process of its own, which need not import everything again."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


class Run(NamedTuple):
    """Processes that train together, and the folder that they share."""

    processes: list[BaseProcess]
    folder: Path


def start(folder: Path, processes: int, steps: int, slow: float) -> Run:
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    hosts = [Hosts(processes, index, "127.0.0.1", port) for index in range(processes)]
    return Run([child(train, folder, steps, slow, host) for host in hosts], folder)


def end(run: Run, seconds: float = 3600) -> list[int | None]:
    """Exit codes, once all have ended; None of one that does not."""
    deadline = time.monotonic() + seconds
    for process in run.processes:
        process.join(max(deadline - time.monotonic(), 0.1))
    return [process.exitcode for process in run.processes]


def working(run: Run) -> bool:
    """Whether all processes are there."""
    return all(process.exitcode is None for process in run.processes)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Metrics of every step, without their speed."""
    path = folder / "metrics.jsonl"
    found = (
        [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    )
    return [{name: value for name, value in line.items() if name not in TIMED} for line in found]


def saving(folder: Path) -> bool:
    """Whether a save is going on."""
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def kill(run: Run, moment: str, rng: random.Random) -> dict[str, Any]:
    """Kills one process or all at a moment, and waits until the others have ended."""
    before, begun = len(lines(run.folder)), time.monotonic()
    steps, early = rng.randint(1, 5), rng.uniform(0, STARTING)

    def reached() -> bool:
        match moment:
            case "start":  # at the latest with the first step, however fast the machine
                return time.monotonic() > begun + early or len(lines(run.folder)) > before
            case "step":
                return len(lines(run.folder)) >= before + steps
            case _:
                return len(lines(run.folder)) > before and saving(run.folder)

    while not reached() and time.monotonic() < begun + 120 and working(run):
        time.sleep(0.002)
    time.sleep(rng.uniform(0, {"start": 0.0, "step": 0.05}.get(moment, 0.03)))
    victims = run.processes if rng.random() < 0.3 else [rng.choice(run.processes)]
    for process in victims:
        process.kill()
    killed = time.monotonic()
    codes = end(run)
    return {
        "moment": moment,
        "killed": [run.processes.index(process) for process in victims],
        "step": lines(run.folder)[-1]["step"] if lines(run.folder) else 0,
        "codes": codes,
        "seconds_until_all_ended": round(time.monotonic() - killed, 2),
    }


def same_state(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same training state, bit for bit."""
    with np.load(a / "state.npz") as one, np.load(b / "state.npz") as other:
        return one.files == other.files and all(one[name].tobytes() == other[name].tobytes() for name in one.files)


def restore(folder: Path, devices: int) -> None:
    """One process with so many devices reads what the processes saved, and numpy without any."""
    jax.config.update("jax_num_cpu_devices", devices)
    config, params = restore_params_numpy(folder / "checkpoints", "params")
    mesh = make_mesh("fsdp")
    shapes = jax.eval_shape(lambda: init_state(config, STAGE, mesh))
    there = shard_state(shapes, mesh, strict=devices > 1)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, there)
    with Store(folder / "checkpoints") as store:
        state, data = store.restore(target, config)
    with np.load(folder / "state.npz") as saved:
        pairs = zip(jax.tree.leaves(state), [saved[name] for name in saved.files], strict=True)
        assert all(np.asarray(x).tobytes() == y.tobytes() for x, y in pairs)
    kernel = state.params["layer"]["kernel"]
    assert data == {"step": config.steps} and len(kernel.sharding.device_set) == devices
    assert kernel.is_fully_replicated == (devices == 1)
    assert params["layer"]["kernel"].tobytes() == np.asarray(kernel).tobytes()


def restores(folder: Path, devices: int) -> bool:
    """Whether so many devices restore the training state, bit for bit."""
    process = child(restore, folder, devices)
    process.join()
    return process.exitcode == 0


def terminated(folder: Path, processes: int, steps: int) -> dict[str, Any]:
    """What a SIGTERM to one process did, after two steps of a new run."""
    kept, broken = folder / "terminated.json", folder / "broken"
    if not kept.exists():
        run = start(broken, processes, steps, 10 * SLOW)
        while len(lines(broken)) < 2 and working(run):
            time.sleep(0.005)
        run.processes[-1].terminate()
        codes = end(run)
        saved = (broken / "checkpoints" / str(lines(broken)[-1]["step"])).is_dir()
        kept.write_text(json.dumps({"terminated": codes, "terminated_saved": saved}))
    return json.loads(kept.read_text())


def matrix(folder: Path, processes: int, kills: int, moments: list[str], seed: int, terminate: bool) -> dict[str, Any]:
    """Runs it all, or what is left of it in a folder that was kept; the figures."""
    began = time.monotonic()
    steps = max(4 * kills, 18)
    if not (folder / "whole" / "state.npz").exists():
        codes = end(start(folder / "whole", processes, steps, 0.0))
        assert codes == [0] * processes, (folder / "whole" / "host0.log").read_text()[-3000:]
    broken, kept = folder / "broken", folder / "events.jsonl"
    results: dict[str, Any] = {"processes": processes, "kills": kills, "steps": steps, "seed": seed}
    if terminate:  # first, while there are steps left to be stopped in
        results |= terminated(folder, processes, steps)
    events = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for number in range(len(events), kills):
        run = start(broken, processes, steps, SLOW)
        events.append(kill(run, moments[number % len(moments)], random.Random(f"{seed} {number}")))
        with kept.open("a") as file:
            print(json.dumps(events[-1]), file=file)
    codes = end(start(broken, processes, steps, 0.0))
    logs = lines(folder / "whole"), lines(broken)
    samples = [(place / "samples" / f"{steps:07d}.png").read_bytes() for place in (folder / "whole", broken)]
    struck = [all(event["codes"][victim] == -signal.SIGKILL for victim in event["killed"]) for event in events]
    others = [code for event in events for i, code in enumerate(event["codes"]) if i not in event["killed"]]
    return results | {
        "ended": codes,
        "same_metrics": logs[0] == logs[1] and [line["step"] for line in logs[1]] == list(range(1, steps + 1)),
        "same_samples": samples[0] == samples[1],
        "same_state": same_state(folder / "whole", broken),
        "all_struck": all(struck),  # no process had come to its end before it was killed
        "survivors_ended_by_themselves": all(code not in (None, 0, -signal.SIGKILL) for code in others),
        "longest_end": max(  # of processes that had begun to train
            (event["seconds_until_all_ended"] for event in events if event["moment"] != "start"), default=0
        ),
        "events": events,
        "seconds": round(time.monotonic() - began),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--moments", nargs="+", default=["step", "save", "step", "save", "start"])
    parser.add_argument("--restore", type=int, nargs="*", default=[1], help="devices")
    parser.add_argument("--terminate", action="store_true", help="also SIGTERM to one process, before the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="is kept, and goes on where it was stopped; else a temporary one")
    parser.add_argument("--out", type=Path, help="figures as JSON")
    options = parser.parse_args()
    sys.modules["torch"] = None  # type: ignore[assignment]  # which tensorboardX would take seconds to import
    import tensorboardX  # noqa: F401

    jax.config.update("jax_compilation_cache_dir", None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        results = matrix(folder, options.processes, options.kills, options.moments, options.seed, options.terminate)
        results["restored"] = {str(devices): restores(folder / "broken", devices) for devices in options.restore}
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({name: value for name, value in results.items() if name != "events"}))
    checks = ("same_metrics", "same_samples", "same_state", "all_struck", "survivors_ended_by_themselves")
    return 0 if all(results[check] for check in checks) and all(results["restored"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
