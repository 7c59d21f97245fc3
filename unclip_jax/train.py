"""One loop for all stages: a pure step, and what surrounds it (logs, previews, guard, checkpoints, resume)."""

import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.store import Store
from unclip_jax.checkpoint.writing import replacing
from unclip_jax.config import TrainConfig
from unclip_jax.data.stall import Stall
from unclip_jax.hosts import is_first
from unclip_jax.optim import (
    ema_update,
    join_vectors,
    learning_rate,
    map_like,
    optimizer,
    part_vectors,
    updates_done,
)
from unclip_jax.preemption import Preempted, Preemption
from unclip_jax.sharding import (
    as_state,
    check_batch_size,
    compiler_options,
    on,
    put_batch,
    replicated,
    rows,
    shard_state,
)
from unclip_jax.types import Batch, Params, PRNGKey, Stage, TrainState
from unclip_jax.watchdog import Watchdog


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


def init_state(config: TrainConfig, stage: Stage, mesh: Mesh, params: Params | None = None) -> TrainState:
    """A fresh training state, created shard by shard on the mesh; `params` replaces the random start."""

    def create(key: PRNGKey, given: Params | None) -> TrainState:
        start = stage.init(key) if given is None else given
        opt_state = optimizer(config.optim, start).init(start)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, start, jax.tree.map(jnp.copy, start), opt_state, zero)

    key = jax.random.key(config.seed)
    shardings = shard_state(jax.eval_shape(create, key, params), mesh)
    return jax.jit(create, out_shardings=shardings)(key, params)


def train_step(
    config: TrainConfig, stage: Stage, state: TrainState, context: Params, batch: Batch, key: PRNGKey
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update: gradient (averaged over micro-batches), AdamW, EMA; what is not finite only counts."""
    key = jax.random.fold_in(key, state.step)
    gradient = jax.value_and_grad(stage.loss, has_aux=True)
    parts = config.optim.accumulate
    if parts == 1:
        (loss, metrics), grads = gradient(state.params, context, batch, key)
    else:
        # Every device cuts its own rows: no row moves between devices.
        pieces = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total: Any, numbered: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            piece, number = numbered
            part, grads = gradient(state.params, context, rows(piece), jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, (part, as_state(grads))), None

        first = jax.tree.map(lambda x: x[0], pieces)
        shapes = jax.eval_shape(gradient, state.params, context, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (pieces, jnp.arange(parts)))
        (loss, metrics), grads = jax.tree.map(lambda x: x / parts, total)
    grads, old = as_state(grads), state
    if joins := config.optim.kind == "adamw":
        grads, old = map_like(join_vectors, (grads, state), state.params)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    descend = optimizer(config.optim, old.params)
    updates, opt_state = descend.update(grads, old.opt_state, old.params, norm=norm)
    params: Any = optax.apply_updates(old.params, updates)
    ema = ema_update(old.ema, params, old.step, config.optim.ema)
    accepted = old._replace(params=params, ema=ema, opt_state=opt_state, skipped=jnp.zeros_like(old.skipped))
    refused = old._replace(skipped=old.skipped + 1)
    # Each leaf reads a copy: what a thousand instructions read costs XLA's fusion the square of their number in time.
    copied = jax.lax.optimization_barrier
    new = jax.tree.map(lambda yes, no: jax.lax.select(copied(finite), yes, no), accepted, refused)
    if joins:
        new = map_like(partial(part_vectors, like=state.params), new, params)
    new = as_state(new._replace(step=state.step + 1))
    rate = learning_rate(config.optim, updates_done(state.opt_state))
    return new, {"loss": loss, **metrics, "gradient_norm": norm, "learning_rate": rate, "skipped": new.skipped}


def jitted_step(config: TrainConfig, stage: Stage, mesh: Mesh) -> Any:
    """`train_step` of state, context, batch and key as `fit` runs it on a mesh: the state is given away."""
    return jax.jit(partial(train_step, config, stage), donate_argnums=0, compiler_options=compiler_options(mesh))


def fit(
    config: TrainConfig,
    stage: Stage,
    context: Params,
    batches: Callable[[int], Iterator[Batch]],
    mesh: Mesh,
    folder: Path,
    *,
    params: Params | None = None,
    resume: bool = True,
    on_save: Callable[[TrainState], None] | None = None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    watchdog: Watchdog | None = None,
) -> TrainState:
    """Trains for config.steps updates and returns the last state.

    batches: from a step number to the batches that follow. folder: takes checkpoints/, metrics.jsonl, TensorBoard
    events and samples/, of the first process alone. params: a start other than random. on_save: called with every state
    that is saved, in every process. evaluate: called every config.eval_every steps, in every process; `score` of what
    it gives is the higher the better. watchdog: is told of every step. Raises TrainingError after config.max_skipped
    non-finite updates in a row, Preempted when the machine is to stop and the step is saved.
    """
    check_batch_size(config.data.batch_size, mesh, config.optim.accumulate)
    folder.mkdir(parents=True, exist_ok=True)
    context = jax.device_put(context, shard_state(context, mesh, strict=False))
    state = init_state(config, stage, mesh, params)
    with (
        Store(folder / "checkpoints", config.keep, config.keep_best) as store,
        Log(folder, config) if is_first() else Silence() as log,
        Preemption() as preemption,
    ):
        if store.latest() is not None:
            if not resume:
                raise CheckpointError(
                    f"'{store.folder}' holds step {store.latest()}: resume it or choose another folder"
                )
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            state, _ = store.restore(target, config)
        step = jitted_step(config, stage, mesh)
        preview = None if stage.preview is None else jax.jit(stage.preview, out_shardings=replicated(mesh))
        key, start = jax.random.key(config.seed + 1), int(state.step)
        # A run that was resumed shows the same pictures as before.
        picks = None if preview is None or start == config.steps else _first_rows(next(batches(0)), mesh)
        losses: list[float] = []
        log.begin(start)
        reader = Stall(batches(start))
        for number, host in zip(range(start, config.steps), reader, strict=False):
            done = number + 1
            if watchdog is not None:
                watchdog.at(done, "trains")
            with on(mesh):
                state, metrics = step(state, context, put_batch(host, mesh), key)
            reader.work = metrics["loss"]
            if done % config.log_every == 0 or done == config.steps:
                values = {name: float(value) for name, value in metrics.items()}
                if values["skipped"] >= config.max_skipped:
                    raise TrainingError(
                        f"the last {int(values['skipped'])} updates up to step {done} had non-finite gradients: lower "
                        f"--optim.learning-rate or set the compute dtype to float32; the last checkpoint is intact"
                    )
                losses.append(values["loss"])
                log.write(done, values | {"data_stall": reader.share()})
            if preview is not None and picks is not None and (done % config.preview_every == 0 or done == config.steps):
                keys = jax.random.split(jax.random.key(0), len(picks.image))
                log.pictures(done, np.asarray(preview(state.ema, context, picks, keys)), picks)
            quality: dict[str, float] = {}
            if evaluate is not None and (done % config.eval_every == 0 or done == config.steps):
                quality = evaluate(state)
                log.evaluated(done, quality)
            stop = preemption.reached(done)
            if done % config.save_every == 0 or done == config.steps or stop:
                finite = [loss for loss in losses if math.isfinite(loss)]
                measured = {"loss": float(np.mean(finite))} if finite else {}
                if config.keep_by == "score":
                    measured = {"score": quality["score"]} if quality else {}
                store.save(state, config, {"step": done}, measured)
                losses = []
                if on_save is not None and not stop:
                    on_save(state)
            if stop and done < config.steps:
                store.wait()
                raise Preempted(f"asked to stop, and saved step {done}: the same command goes on from there")
            if watchdog is not None:
                watchdog.at(done + 1, "reads its rows of")
    return state


def _first_rows(host: Batch, mesh: Mesh) -> Batch:
    """The first 16 rows of a batch, the same for every process."""
    cut = jax.jit(lambda batch: jax.tree.map(lambda x: x[:16], batch), out_shardings=replicated(mesh))
    return cut(put_batch(host, mesh))


class Silence:
    """What a Log is where another process writes it."""

    def __enter__(self) -> "Silence":
        return self

    def begin(self, step: int) -> None:
        """Does nothing."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Does nothing."""

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Does nothing."""

    def pictures(self, step: int, samples: np.ndarray, batch: Batch) -> None:
        """Does nothing."""

    def __exit__(self, *_: object) -> None:
        pass


class Log:
    """Progress bar, metrics.jsonl, TensorBoard events and sample grids of one run."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self.folder, self.config = folder, config

    def __enter__(self) -> "Log":
        self._lines: Any = None
        self._events: Any = None
        self._bar: Any = None
        return self

    def begin(self, step: int) -> None:
        """Starts the bar and the clock at a step; what an interrupted run wrote of later steps is forgotten."""
        from tensorboardX import SummaryWriter

        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines(True) if _step_of(line) <= step]
            with replacing(path) as new:
                new.write_text("".join(kept), encoding="utf-8")
        self._lines = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)
        self._bar = tqdm(total=self.config.steps, initial=step, desc=self.config.name, unit="step", dynamic_ncols=True)
        self._clock, self._last = time.monotonic(), step

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the metrics of a step, with pictures per second since the last call."""
        now = time.monotonic()
        speed = (step - self._last) * self.config.data.batch_size / max(now - self._clock, 1e-9)
        values = {**values, "images_per_second": speed}
        self._bar.update(step - self._last)
        waits = f", {values['data_stall']:.0%} of the time waiting for data" if values["data_stall"] >= 0.05 else ""
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed:.0f} images/s{waits}")
        self._clock, self._last = now, step
        record = {"step": step, "images": step * self.config.data.batch_size, **values}
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}  # JSON has no NaN
        self._lines.write(json.dumps(finite) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Logs what an evaluation found, in a line of its own, under names that begin with eval/."""
        named = {f"eval/{name}": value for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in named.items()}
        self._lines.write(json.dumps({"step": step, **finite}) + "\n")
        self._lines.flush()
        for name, value in named.items():
            self._events.add_scalar(name, value, step)
        tqdm.write(f"step {step}: {', '.join(f'{name} {value:.3f}' for name, value in values.items())}")

    def pictures(self, step: int, samples: np.ndarray, batch: Batch) -> None:
        """Writes a grid: samples, with the true pictures beside them, four pairs to a row."""
        pairs = np.concatenate([samples, np.asarray(batch.image)], axis=2)
        columns = min(4, len(pairs))
        pairs = pairs[: len(pairs) // columns * columns]
        rows = [np.concatenate(list(row), axis=1) for row in pairs.reshape(-1, columns, *pairs.shape[1:])]
        path = self.folder / "samples" / f"{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.concatenate(rows, axis=0)).save(path)

    def __exit__(self, *_: object) -> None:
        for file in (self._lines, self._events, self._bar):
            if file is not None:
                file.close()


def _step_of(line: str) -> float:
    """The step of a line of metrics; that of a torn one lies beyond all others."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
