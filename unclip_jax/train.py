"""One loop for all stages: a pure step, and what surrounds it (logs, previews, guard, checkpoints, resume)."""

import json
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

from unclip_jax.checkpoint.store import Store
from unclip_jax.config import TrainConfig
from unclip_jax.optim import ema_update, learning_rate, optimizer
from unclip_jax.sharding import check_batch_size, put_batch, replicated, shard_state
from unclip_jax.types import Batch, Params, PRNGKey, Stage, TrainState


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
        pieces = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch)

        def add(total: Any, numbered: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            piece, number = numbered
            part = gradient(state.params, context, piece, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, part), None

        first = jax.tree.map(lambda x: x[0], pieces)
        shapes = jax.eval_shape(gradient, state.params, context, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (pieces, jnp.arange(parts)))
        (loss, metrics), grads = jax.tree.map(lambda x: x / parts, total)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    updates, opt_state = optimizer(config.optim, state.params).update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    ema = ema_update(state.ema, params, state.step, config.optim.ema)
    accepted = state._replace(params=params, ema=ema, opt_state=opt_state, skipped=jnp.zeros_like(state.skipped))
    refused = state._replace(skipped=state.skipped + 1)
    new = jax.tree.map(partial(jnp.where, finite), accepted, refused)
    new = new._replace(step=state.step + 1)
    rate = learning_rate(config.optim, state.step)
    return new, {"loss": loss, **metrics, "gradient_norm": norm, "learning_rate": rate, "skipped": new.skipped}


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
) -> TrainState:
    """Trains for config.steps updates and returns the last state.

    batches: from a step number to the batches that follow. folder: takes checkpoints/, metrics.jsonl, TensorBoard
    events and samples/. params: a start other than random. on_save: called with every state that is saved.
    Raises TrainingError after config.max_skipped non-finite updates in a row.
    """
    check_batch_size(config.data.batch_size, mesh)
    folder.mkdir(parents=True, exist_ok=True)
    context = jax.device_put(context, replicated(mesh))
    state = init_state(config, stage, mesh, params)
    with Store(folder / "checkpoints", config.keep) as store, Log(folder, config) as log:
        if resume and store.latest() is not None:
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            state, _ = store.restore(target, config)
        step = jax.jit(partial(train_step, config, stage), donate_argnums=0)
        preview = None if stage.preview is None else jax.jit(stage.preview)
        key, start = jax.random.key(config.seed + 1), int(state.step)
        examples = None
        log.begin(start)
        for number, rows in zip(range(start, config.steps), batches(start), strict=False):
            examples = rows if examples is None else examples
            state, metrics = step(state, context, put_batch(rows, mesh), key)
            done = number + 1
            if done % config.log_every == 0 or done == config.steps:
                values = {name: float(value) for name, value in metrics.items()}
                if values["skipped"] >= config.max_skipped:
                    raise TrainingError(
                        f"the last {int(values['skipped'])} updates up to step {done} had non-finite gradients: lower "
                        f"--optim.learning-rate or set the compute dtype to float32; the last checkpoint is intact"
                    )
                log.write(done, values)
            if preview is not None and (done % config.preview_every == 0 or done == config.steps):
                picks = jax.tree.map(lambda x: x[:16], examples)
                keys = jax.random.split(jax.random.key(0), len(picks.image))
                log.pictures(done, np.asarray(preview(state.ema, context, picks, keys)), picks)
            if done % config.save_every == 0 or done == config.steps:
                store.save(state, config, {"step": done}, {})
                if on_save is not None:
                    on_save(state)
    return state


class Log:
    """Progress bar, metrics.jsonl, TensorBoard events and sample grids of one run."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self.folder, self.config = folder, config

    def __enter__(self) -> "Log":
        from tensorboardX import SummaryWriter

        self._lines = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._events = SummaryWriter(str(self.folder))
        self._bar: Any = None
        return self

    def begin(self, step: int) -> None:
        """Starts the bar and the clock at a step."""
        self._bar = tqdm(total=self.config.steps, initial=step, desc=self.config.name, unit="step", dynamic_ncols=True)
        self._clock, self._last = time.monotonic(), step

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the metrics of a step, with pictures per second since the last call."""
        now = time.monotonic()
        speed = (step - self._last) * self.config.data.batch_size / max(now - self._clock, 1e-9)
        values = {**values, "images_per_second": speed}
        self._bar.update(step - self._last)
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed:.0f} images/s")
        self._clock, self._last = now, step
        record = {"step": step, "images": step * self.config.data.batch_size, **values}
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

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
        self._lines.close()
        self._events.close()
        if self._bar is not None:
            self._bar.close()
