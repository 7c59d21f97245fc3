from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.checkpoint import CheckpointError
from unclip_jax.checkpoint.store import Store, restore_params_numpy
from unclip_jax.config import DecoderConfig, DiffusionConfig, OptimConfig, PriorConfig, TrainConfig
from unclip_jax.optim import optimizer
from unclip_jax.sharding import make_mesh, shard_state
from unclip_jax.types import TrainState

CONFIG = TrainConfig("tiny", DecoderConfig())


def state(step: int) -> TrainState:
    params = {"dense": {"kernel": jnp.full((4, 3), step + 0.5), "bias": jnp.arange(3.0)}}
    ema = jax.tree.map(lambda leaf: leaf + 1, params)
    opt_state = optimizer(CONFIG.optim, params).init(params)
    return TrainState(jnp.int32(step), params, ema, opt_state, jnp.int32(2))


def target(tree: TrainState) -> TrainState:
    shapes = jax.eval_shape(lambda: tree)
    shardings = shard_state(shapes, make_mesh(devices=jax.devices()[:1]))
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with Store(folder, keep=2) as store:
        for step in (1, 2, 3):
            store.save(state(step), CONFIG, {"index": 10 * step}, {"loss": 0.5})
        store.save(state(3), CONFIG, {"index": 30}, {})  # again: nothing happens
    return folder


def test_the_latest_state_comes_back(folder: Path):
    with Store(folder, keep=2) as store:
        assert store.latest() == 3
        restored, data = store.restore(target(state(0)), replace(CONFIG, name="other", optim=OptimConfig(ema=0.5)))
    assert isinstance(restored, TrainState) and data == {"index": 30}
    assert jax.tree.structure(restored) == jax.tree.structure(state(3))
    jax.tree.map(np.testing.assert_array_equal, restored, state(3))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


@pytest.mark.parametrize("part", ["params", "ema"])
def test_parameters_alone_come_back_as_numpy(folder: Path, part: str):
    config, params = restore_params_numpy(folder, part)
    assert config == CONFIG and all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params, getattr(state(3), part))


def _refusal(action: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_config_is_refused_by_name(folder: Path):
    other = replace(CONFIG, name="big", network=DecoderConfig(size=32), diffusion=DiffusionConfig(schedule="linear"))
    with Store(folder) as store:
        sentence = _refusal(lambda: store.restore(target(state(0)), other))
        assert "was trained as 'tiny' and does not fit 'big'" in sentence
        assert "network.size is 64 there and 32 here" in sentence
        assert "diffusion.schedule is 'cosine' there and 'linear' here" in sentence
        sentence = _refusal(lambda: store.restore(target(state(0)), replace(CONFIG, network=PriorConfig())))
        assert "network is DecoderConfig there and PriorConfig here" in sentence


def test_another_tree_is_refused_by_name(folder: Path):
    with Store(folder) as store:
        wrong = target(state(0))._replace(params={"dense": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}})
        sentence = _refusal(lambda: store.restore(wrong, CONFIG))
        assert "unknown dense/bias" in sentence and "dense/kernel (4, 3), expected (4, 4)" in sentence


def test_an_earlier_step_does_not_vanish_silently(folder: Path):
    with Store(folder) as store:
        assert "already holds step 3, later than 1" in _refusal(lambda: store.save(state(1), CONFIG, {}, {}))


def test_empty_and_missing_folders(tmp_path: Path):
    with Store(tmp_path / "new") as store:
        assert store.latest() is None
        assert "holds no whole checkpoint" in _refusal(lambda: store.restore(target(state(0)), CONFIG))
    assert "holds no whole checkpoint" in _refusal(lambda: restore_params_numpy(tmp_path / "new"))
    assert "there is no checkpoint folder" in _refusal(lambda: restore_params_numpy(tmp_path / "none"))
    (tmp_path / "file").write_text("")
    assert "cannot save" in _refusal(lambda: Store(tmp_path / "file" / "run"))


def test_an_interrupted_save_is_ignored_and_removed(tmp_path: Path):
    with Store(tmp_path) as store:
        store.save(state(1), CONFIG, {}, {})
    partial = tmp_path / "2.orbax-checkpoint-tmp" / "state"
    partial.mkdir(parents=True)
    (partial / "manifest.ocdbt").write_bytes(b"half")
    with Store(tmp_path) as store:
        assert store.latest() == 1
        store.save(state(2), CONFIG, {}, {})
    with Store(tmp_path) as store:
        assert store.latest() == 2


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with Store(tmp_path) as store:
        store.save(state(1), CONFIG, {}, {})
        store.wait()

        def fail(*_: Any, **__: Any) -> None:
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']")

        with monkeypatch.context() as patch:
            patch.setattr(store._manager, "save", fail)
            assert "the disk is full" in _refusal(lambda: store.save(state(2), CONFIG, {}, {}))
        assert store.latest() == 1
