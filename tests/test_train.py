import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unclip_jax.checkpoint.safetensors import load_network, save_network
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.store import Store
from unclip_jax.config import (
    ArPriorConfig,
    ClipConfig,
    DataConfig,
    OptimConfig,
    PriorConfig,
    TrainConfig,
    TransformerConfig,
)
from unclip_jax.sharding import make_mesh
from unclip_jax.train import TrainingError, fit, init_state, train_step
from unclip_jax.types import Batch, Stage, TrainState

DARK, SHINY = 13, 14  # tokens that make the toy's loss, or only its gradient, blow up


def toy(preview: bool = False) -> Stage:
    """Fits the mean pixel of each picture by a linear function of its first row; a token can break it."""

    def init(key):
        return {"layer": {"kernel": jax.random.normal(key, (12, 1)), "bias": jnp.zeros(1)}}

    def loss(params, context, batch: Batch, key):
        x = batch.image.astype(jnp.float32) / 255
        guess = x[:, 0].reshape(len(x), 12) @ params["layer"]["kernel"] + params["layer"]["bias"]
        error = (guess[:, 0] - x.mean((1, 2, 3))) ** 2
        error = jnp.where(jnp.any(batch.tokens == DARK, axis=1), jnp.nan, error).mean()
        # Finite, with a gradient that is not.
        steep = jnp.sqrt(jnp.where(jnp.any(batch.tokens == SHINY), 0.0 * params["layer"]["bias"][0], 1.0))
        return error + steep, {"guess": guess.mean()}

    def picture(params, context, batch: Batch, keys):
        value = jnp.clip(128 + 3000 * params["layer"]["bias"][0], 0, 255)
        return jnp.full(batch.image.shape, value).astype(jnp.uint8)

    return Stage(init, loss, picture if preview else None)


def rows(step: int, size: int = 8, token: int = 1) -> Batch:
    rng = np.random.default_rng([7, step])
    tokens = np.full((size, 2), token, np.int32)
    return Batch(rng.integers(0, 256, (size, 4, 4, 3), np.uint8), tokens, np.ones((size, 2), bool))


def stream(start: int, broken: dict[int, int] | None = None) -> Iterator[Batch]:
    for step in count(start):
        yield rows(step, token=(broken or {}).get(step, 1))


CONFIG = TrainConfig(
    "toy",
    ClipConfig(),
    data=DataConfig(batch_size=8),
    optim=OptimConfig(learning_rate=1e-2, warmup=2, ema=0.9),
    steps=4,
    log_every=1,
    save_every=2,
    preview_every=2,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def step():
    return jax.jit(partial(train_step, CONFIG, toy()))


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def test_two_steps_resumed_by_two_equal_four(tmp_path, mesh):
    whole = fit(CONFIG, toy(), {}, stream, mesh, tmp_path / "whole")
    fit(replace(CONFIG, steps=2), toy(), {}, stream, mesh, tmp_path / "parts")
    resumed = fit(CONFIG, toy(), {}, stream, mesh, tmp_path / "parts")
    assert int(resumed.step) == 4 and same(whole, resumed)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and [line["images"] for line in lines] == [8, 16, 24, 32]
    assert {"loss", "guess", "gradient_norm", "learning_rate", "images_per_second"} <= set(lines[0])
    # Nothing is left to do, and nothing is done.
    assert same(fit(CONFIG, toy(), {}, stream, mesh, tmp_path / "parts"), whole)


@pytest.mark.parametrize("token", [DARK, SHINY])
def test_a_step_that_is_not_finite_changes_nothing(mesh, step, token):
    key, state = jax.random.key(1), init_state(CONFIG, toy(), mesh)
    state, _ = step(state, {}, rows(0), key)
    refused, metrics = step(state, {}, rows(1, token=token), key)
    for part in ("params", "ema", "opt_state"):
        assert same(getattr(refused, part), getattr(state, part))
    assert int(refused.step) == 2 and int(refused.skipped) == 1 == int(metrics["skipped"])
    assert not np.isfinite(metrics["loss"] + metrics["gradient_norm"])
    again, _ = step(refused, {}, rows(2, token=token), key)
    assert int(again.skipped) == 2
    accepted, _ = step(again, {}, rows(3), key)
    assert int(accepted.skipped) == 0 and not same(accepted.params, state.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(accepted))


def test_several_in_a_row_stop_with_a_sentence(tmp_path, mesh):
    config = replace(CONFIG, steps=30, max_skipped=3)
    broken = {1: DARK, 2: DARK, **{step: DARK for step in range(5, 30)}}
    with pytest.raises(TrainingError, match=r"the last 3 updates up to step 8 .*--optim.learning-rate.*intact"):
        fit(config, toy(), {}, partial(stream, broken=broken), mesh, tmp_path)
    with Store(tmp_path / "checkpoints") as store:
        assert store.latest() == 6
        state, _ = store.restore(jax.eval_shape(lambda: init_state(config, toy(), mesh)), config)
    assert int(state.step) == 6 and int(state.skipped) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_accumulation_equals_the_whole_batch(mesh, step):
    key, start = jax.random.key(1), init_state(CONFIG, toy(), mesh)
    parts = jax.jit(partial(train_step, replace(CONFIG, optim=replace(CONFIG.optim, accumulate=4)), toy()))
    whole, whole_metrics = step(start, {}, rows(0), key)
    summed, metrics = parts(start, {}, rows(0), key)
    for name in ("loss", "guess", "gradient_norm"):
        np.testing.assert_allclose(metrics[name], whole_metrics[name], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(summed.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    refused, _ = parts(start, {}, rows(0)._replace(tokens=np.array([[1, DARK]] + [[1, 1]] * 7, np.int32)), key)
    assert int(refused.skipped) == 1 and same(refused.params, start.params)


def test_previews_and_saves_show_the_average(tmp_path, mesh):
    saved = []

    def on_save(state: TrainState) -> None:
        saved.append(jax.tree.map(np.array, (state.step, state.params, state.ema)))

    fit(CONFIG, toy(preview=True), {}, stream, mesh, tmp_path, on_save=on_save)
    assert [int(step) for step, *_ in saved] == [2, 4]
    for step, params, ema in saved:
        grid = np.asarray(Image.open(tmp_path / "samples" / f"{step:07d}.png"))
        assert grid.shape == (2 * 4, 4 * 2 * 4, 3)  # eight pairs of 4 px pictures, four to a row
        averaged, latest = (int(np.clip(128 + 3000 * tree["layer"]["bias"][0], 0, 255)) for tree in (ema, params))
        assert averaged != latest and abs(int(grid[0, 0, 0]) - averaged) <= 1
        assert np.array_equal(grid[:4, 4:8], rows(0).image[0])  # the true picture beside it


def test_previews_of_small_batches(tmp_path, mesh):
    config = replace(CONFIG, data=DataConfig(batch_size=2), steps=2)
    fit(config, toy(preview=True), {}, lambda start: (rows(step, 2) for step in count(start)), mesh, tmp_path)
    assert Image.open(tmp_path / "samples" / "0000002.png").size == (2 * 2 * 4, 4)


TINY_CLIP = TrainConfig(
    "tiny_clip",
    ClipConfig(
        embedding_dim=8,
        image_size=64,
        patch_size=32,
        vision=TransformerConfig(width=16, layers=1, heads=2),
        text=TransformerConfig(width=16, layers=1, heads=2, causal=True),
        vocab_size=576,
        context_length=32,
    ),
    data=DataConfig(batch_size=4),
    optim=OptimConfig(learning_rate=1e-3, warmup=1, ema=0.9),
    steps=4,
    log_every=2,
    save_every=2,
)
TINY_PRIOR = replace(
    TINY_CLIP,
    name="tiny_prior",
    network=PriorConfig(8, 16, 32, TransformerConfig(width=16, layers=1, heads=2, causal=True, dropout=0.1)),
    data=DataConfig(batch_size=4, stored=16),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, mesh):
    """A folder with a CLIP of four steps and the state it ended with."""
    from unclip_jax.run import train

    folder = tmp_path_factory.mktemp("run")
    return folder, train(TINY_CLIP, folder, mesh)


def test_weights_are_the_average(trained):
    folder, state = trained
    network = load_network(folder / "clip.safetensors", expect=ClipConfig)
    assert network.config == TINY_CLIP and network.extra["steps"] == 4 and network.extra["images"] == 16
    assert same(network.params, jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), state.ema))
    assert not same(network.params, jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), state.params))
    assert {"cat", "blue", "left", "openmoji"} <= set(network.extra["words"]) and len(network.extra["kept_ids"]) == 573


def test_a_prior_trains_on_stored_embeddings_and_resumes_bit_for_bit(trained, mesh, tmp_path):
    from unclip_jax import run

    clip = str(trained[0] / "clip.safetensors")
    config = replace(TINY_PRIOR, clip=clip)
    whole = run.train(config, tmp_path / "whole", mesh)
    run.train(replace(config, steps=2), tmp_path / "parts", mesh)
    assert same(run.train(config, tmp_path / "parts", mesh), whole)
    network, frozen = load_network(tmp_path / "parts" / "prior.safetensors"), load_network(clip)
    assert network.clip == frozen.digest
    mean, std = network.constants["whitening"]["mean"], network.constants["whitening"]["std"]
    assert mean.shape == std.shape == (8,) and mean.dtype == np.float32 and len(set(std.tolist())) == 1
    with np.load(next((tmp_path / "parts").glob("**/embeddings-*.npz"))) as columns:
        stored = columns["embedding"]
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(((stored - mean) / std).mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(((stored - mean) / std).std(0).mean(), 1, rtol=1e-3)


def test_an_ar_prior_keeps_the_constants_that_it_was_trained_with(trained, mesh, tmp_path):
    """Resumed or started from a file, it reads them from there; a changed file shows that nothing is fitted again."""
    from unclip_jax.run import train

    clip = str(trained[0] / "clip.safetensors")
    network = ArPriorConfig(8, 16, 32, 8, 16, 4, TransformerConfig(width=16, layers=1, heads=2, causal=True))
    config, folder = replace(TINY_PRIOR, name="tiny_ar", network=network, clip=clip), tmp_path / "run"
    train(replace(config, steps=2), folder, mesh)
    path = folder / "ar_prior.safetensors"
    fitted = load_network(path)
    tables = fitted.constants["quantiser"]
    np.testing.assert_allclose(tables["components"].T @ tables["components"], np.eye(8), atol=1e-5)
    assert tables["buckets"] == 16 and tables["dot_edges"].shape == (3,)
    changed = {"quantiser": tables | {"low": tables["low"] - 1}}
    save_network(path, config, fitted.params, constants=changed, clip=fitted.clip)
    shutil.copy(path, tmp_path / "start.safetensors")
    train(replace(config, steps=3), folder, mesh)
    assert load_network(path).extra["steps"] == 3 and same(load_network(path).constants, changed)
    train(replace(config, steps=1), tmp_path / "new", mesh, init_from=tmp_path / "start.safetensors")
    assert same(load_network(tmp_path / "new" / "ar_prior.safetensors").constants, changed)


def test_too_few_components_are_refused_before_training(trained, mesh, tmp_path):
    from unclip_jax.run import train

    network = ArPriorConfig(8, 16, 32, 1, 16, 4, TransformerConfig(width=16, layers=1, heads=2, causal=True))
    config = replace(TINY_PRIOR, network=network, clip=str(trained[0] / "clip.safetensors"))
    with pytest.raises(ValueError, match="the network has 1: set --network.components"):
        train(config, tmp_path, mesh)


def test_training_starts_from_given_weights(trained, mesh, tmp_path):
    from unclip_jax.run import train

    folder, state = trained
    config = replace(TINY_CLIP, steps=1, optim=replace(TINY_CLIP.optim, learning_rate=0.0))
    started = train(config, tmp_path, mesh, init_from=folder / "clip.safetensors")
    assert same(started.params, load_network(folder / "clip.safetensors").params)
    wider = replace(config, network=replace(TINY_CLIP.network, embedding_dim=9))
    with pytest.raises(CheckpointError, match="mis-shaped"):
        train(wider, tmp_path / "wider", mesh, init_from=folder / "clip.safetensors")


def test_what_does_not_fit_is_refused(mesh, tmp_path):
    from unclip_jax.run import train

    other = replace(TINY_CLIP, network=replace(TINY_CLIP.network, vocab_size=500))
    with pytest.raises(ValueError, match=r"use 576 ids and the network has 500: set --network.vocab-size 576"):
        train(other, tmp_path, mesh)
    with pytest.raises(CheckpointError, match="no weights file"):
        train(TINY_PRIOR, tmp_path, mesh)
    assert not list(tmp_path.iterdir())


EIGHT = """
import json, sys, tempfile, jax, numpy as np
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_train import CONFIG, stream, toy
from unclip_jax import sharding
from unclip_jax.train import fit

sharding.rules.SMALL = 4  # so that even the toy's kernel is split
# Adam magnifies the rounding of gradients that are almost zero, which epsilon damps.
config = replace(CONFIG, optim=replace(CONFIG.optim, epsilon=1e-3))
results = []
for mesh in (sharding.make_mesh(devices=jax.devices()[:1]), sharding.make_mesh("data=4,fsdp=2")):
    with tempfile.TemporaryDirectory() as folder:
        state = fit(config, toy(), {}, stream, mesh, Path(folder))
        losses = [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        results.append((losses, state))
(one, a), (eight, b) = results
np.testing.assert_allclose(one, eight, rtol=1e-6)
assert len(one) == 4 and one[-1] != one[0]
for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)
for part in (b.params, b.ema, b.opt_state):  # still split after four steps
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(part))
"""


def test_one_device_equals_eight():
    """In all that surrounds the step: its numbers are compared, stage by stage, in test_sharding."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", EIGHT, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_log_folder_is_complete(trained):
    folder = Path(trained[0]) / "tiny_clip"
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [2, 4]
    assert list(folder.glob("events.*")) and (folder / "checkpoints" / "4").is_dir()
