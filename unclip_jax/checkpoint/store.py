"""Training checkpoints in a folder: Orbax, with the config and the data position inside."""

import logging
import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from unclip_jax.checkpoint.safetensors import check_tree, write_failure
from unclip_jax.checkpoint.schema import CheckpointError, from_json, to_json
from unclip_jax.config import TrainConfig
from unclip_jax.types import Params, TrainState

# Orbax logs whole tracebacks of what it also raises, and warns of files that it does not need.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Store:
    """A folder of training checkpoints, of which the newest `keep` stay, and the `best` ones.

    A save is written in the background and counts only once it is whole, so an interrupted one leaves the one before
    it as the latest; `close` (or leaving the `with` block) waits for it.
    """

    def __init__(self, folder: str | Path, keep: int = 2, best: int = 0) -> None:
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            best_fn=_loss,  # without it no metrics are written
            preservation_policy=_NewestAndBest(keep, best),
            create=True,
            cleanup_tmp_directories=True,
            single_host_load_and_broadcast=jax.process_count() > 1,  # all hosts go on from the same step
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except (OSError, ValueError) as error:
            raise CheckpointError(write_failure(self.folder, error)) from error

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, config: TrainConfig, data_state: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Saves the state under its step, with the data position and metrics (both JSON values) beside it.

        The best checkpoints are those of the highest metric `score`, where there is none of the lowest `loss`.
        Saving a step that is already saved does nothing. Raises CheckpointError where the folder holds a later step
        than this (another run), or cannot be written.
        """
        step, latest = int(state.step), self.latest()
        if latest == step:
            return
        if latest is not None and latest > step:
            raise CheckpointError(
                f"'{self.folder}' already holds step {latest}, later than {step}: resume it or choose another folder"
            )
        meta = {"config": to_json(config), "data": data_state, "metrics": metrics}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._write(lambda: self._manager.save(step, args=items, metrics=metrics))

    def wait(self) -> None:
        """Waits until the last save is on disk; CheckpointError where it failed."""
        self._write(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits for the last save and lets the folder go."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(self, target: TrainState, config: TrainConfig) -> tuple[TrainState, dict[str, Any]]:
        """The latest state, laid out as `target` (a tree of ShapeDtypeStruct with shardings), and the data position.

        Raises CheckpointError where there is none, or where it was trained with another network or diffusion process
        than `config` names; optimiser, data and loop may differ.
        """
        step = self.latest()
        if step is None:
            raise CheckpointError(f"'{self.folder}' holds no whole checkpoint: start the run without resuming")
        meta = _meta(self._manager, step)
        _check_config(_train_config(meta, self.folder), config, self.folder)
        saved = _metadata(self.folder / str(step) / "state")
        for part in ("params", "ema"):
            check_tree(getattr(target, part), saved[part], f"'{self.folder}' ({part})")
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            return self._manager.restore(step, args=args)["state"], meta["data"]
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"step {step} of '{self.folder}' cannot be restored: {reason}") from error

    def _write(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # the storage layer raises many types, the system's reason is in the text
            raise CheckpointError(write_failure(self.folder, error)) from error


def restore_params_numpy(folder: str | Path, part: str = "ema") -> tuple[TrainConfig, Params]:
    """Config and parameters (`part` is ema or params) of the latest checkpoint as numpy arrays.

    Reads neither moments nor shardings, so a checkpoint of many devices opens on a machine with one.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder '{folder}': check the path")
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        step = manager.latest_step()
        if step is None:
            raise CheckpointError(f"'{folder}' holds no whole checkpoint: let the run save one first")
        meta = _meta(manager, step)
    state = folder / str(step) / "state"
    item = {part: _metadata(state)[part]}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        return _train_config(meta, folder), reader.restore(state, args=args)[part]


def _loss(metrics: dict[str, float] | None) -> float:
    known = metrics or {}
    return -known["score"] if "score" in known else known.get("loss", math.inf)


class _NewestAndBest(NamedTuple):
    """Orbax's question which checkpoints stay, answered."""

    newest: int
    best: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        ranked = sorted(checkpoints, key=lambda info: (_loss(info.metrics), -info.step))
        measured = [info for info in ranked if _loss(info.metrics) < math.inf]
        kept = {info.step for info in (*measured[: self.best], *checkpoints[-self.newest :])}
        return [info.step in kept for info in checkpoints]


def _meta(manager: ocp.CheckpointManager, step: int) -> Any:
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def _train_config(meta: Any, folder: Path) -> TrainConfig:
    config = from_json(meta.get("config"))
    if not isinstance(config, TrainConfig):
        raise CheckpointError(f"'{folder}' carries a {type(config).__name__}, expected a TrainConfig")
    return config


def _check_config(saved: TrainConfig, config: TrainConfig, folder: Path) -> None:
    differing = [
        difference
        for part in ("network", "diffusion")
        for difference in _differences(getattr(saved, part), getattr(config, part), part)
    ]
    if differing:
        raise CheckpointError(
            f"'{folder}' was trained as '{saved.name}' and does not fit '{config.name}': {'; '.join(differing)}"
        )


def _differences(saved: Any, config: Any, path: str) -> list[str]:
    if type(saved) is not type(config):
        return [f"{path} is {_show(saved)} there and {_show(config)} here"]
    if not is_dataclass(saved):
        return [] if saved == config else [f"{path} is {saved!r} there and {config!r} here"]
    return [
        difference
        for entry in fields(saved)
        if entry.compare
        for difference in _differences(getattr(saved, entry.name), getattr(config, entry.name), f"{path}.{entry.name}")
    ]


def _show(value: Any) -> str:
    return type(value).__name__ if is_dataclass(value) else repr(value)


def _metadata(folder: Path) -> Any:
    """Tree of the saved arrays' shapes, as nested dicts."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        metadata = reader.metadata(folder)
    return getattr(metadata, "item_metadata", metadata).tree
