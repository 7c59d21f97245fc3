import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from unclip_jax import sharding
from unclip_jax.config import OptimConfig
from unclip_jax.optim import optimizer
from unclip_jax.sharding import (
    AXES,
    Strategy,
    abstract_mesh,
    batch_sharding,
    check_batch_size,
    compiler_options,
    host_rows,
    make_mesh,
    put_batch,
    replicated,
    resolve,
    shard_state,
)
from unclip_jax.sharding.compiling import GATHER_WHILE_COMPUTING, WHOLE_WEIGHTS
from unclip_jax.types import Batch, TrainState


def state() -> TrainState:
    params = {
        "stem": {"kernel": jnp.zeros((3, 3, 3, 320)), "bias": jnp.zeros(320)},
        "down": {"conv_0": {"kernel": jnp.zeros((3, 3, 320, 640)), "bias": jnp.zeros(640)}},
        "mlp_in": {"kernel": jnp.zeros((640, 2560)), "bias": jnp.zeros(2560)},
        "query": {"kernel": jnp.zeros((640, 10, 64)), "bias": jnp.zeros((10, 64))},
        "tokens": {"embedding": jnp.zeros((49407, 640))},
    }
    opt_state = optimizer(OptimConfig(), params).init(params)
    return TrainState(jnp.int32(0), params, params, opt_state, jnp.int32(0))


def specs(strategy: str) -> dict:
    mesh = abstract_mesh(resolve(strategy, 8))
    return jax.tree.map(lambda leaf: leaf.spec, shard_state(jax.eval_shape(state), mesh).params)


def test_names_and_mixtures():
    assert resolve("dp", 8) == Strategy(data=8) and resolve("fsdp", 8) == Strategy(fsdp=8)
    assert resolve("tp", 16) == Strategy(data=2, tensor=8) and resolve("spatial", 4) == Strategy(spatial=4)
    assert resolve("hsdp", 8, slices=2) == Strategy(data=2, fsdp=4, slices=2)
    assert resolve("fsdp=2,tensor=2", 8) == Strategy(data=2, fsdp=2, tensor=2)
    assert resolve(str(Strategy(2, 2, 2)), 8) == Strategy(2, 2, 2) and str(Strategy()) == "data=1"


@pytest.mark.parametrize(
    ("torus", "fsdp"),
    [
        ((4, 4, 4), 16),
        ((4, 4, 8), 32),
        ((8, 8, 8), 32),
        ((16, 16), 32),
        ((2, 4), 8),
        ((4, 4), 8),
        ((4, 8), 16),
        ((8, 8), 32),
        ((64,), 32),
        (None, 32),
    ],
)
def test_fsdp_takes_a_side_of_a_torus_and_a_part_of_another_and_not_all_of_it(torus, fsdp):
    devices = 64 if torus is None else int(np.prod(torus))
    assert resolve("fsdp", devices, torus=torus) == Strategy(data=devices // fsdp, fsdp=fsdp)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fdsp", "unknown strategy 'fdsp': did you mean fsdp"),
        ("fsdp=4,tensr=2", "did you mean tensor=N"),
        ("fsdp=3", r"the mesh fsdp=3 takes 3 devices and there are 8: use data=2,fsdp=4, the nearest"),
        ("data=3,tensor=2", r"takes 6 devices and there are 8: use data=4,tensor=2, the nearest"),
        ("tensor=0", "every axis has one size, a positive number"),
        ("hsdp", r"these 8 devices are one slice: use fsdp, or sizes such as data=2,fsdp=4"),
        ("fsdp=8,slices=2", r"data=1 does not divide over 2 slices: use a multiple of 2"),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_what_does(name, message):
    with pytest.raises(ValueError, match=message):
        resolve(name, 8)


def test_state_is_split_evenly_and_moments_lie_with_parameters():
    shardings = shard_state(jax.eval_shape(state), abstract_mesh(Strategy(fsdp=2, tensor=2)))
    assert shardings.params == shardings.ema == shardings.opt_state[1].mu == shardings.opt_state[1].nu


def test_largest_divisible_axis_is_split_and_small_leaves_are_not():
    found = specs("fsdp")
    assert found["down"]["conv_0"]["kernel"] == PartitionSpec(None, None, None, "fsdp")
    assert found["tokens"]["embedding"] == PartitionSpec(None, "fsdp")  # 49407 is odd
    assert found["stem"]["kernel"] == found["mlp_in"]["bias"] == PartitionSpec()
    assert all(
        spec == PartitionSpec() for spec in jax.tree.leaves(specs("dp"), is_leaf=lambda x: isinstance(x, PartitionSpec))
    )


def test_tensor_splits_heads_and_channels_and_fsdp_another_axis():
    found = specs("data=2,fsdp=2,tensor=2")
    assert found["query"]["kernel"] == PartitionSpec("fsdp", "tensor")
    assert found["down"]["conv_0"]["kernel"] == PartitionSpec(None, None, "fsdp", "tensor")
    assert found["mlp_in"]["kernel"] == PartitionSpec("fsdp", "tensor")


def test_a_giant_that_cannot_be_split_is_refused_by_name():
    shapes = {"odd": {"kernel": jax.ShapeDtypeStruct((5002, 5001), jnp.float32)}}
    message = r"odd/kernel of shape \(5002, 5001\) would lie whole .* fsdp=8 .*: use fsdp=2,tensor=1"
    with pytest.raises(ValueError, match=message):
        shard_state(shapes, abstract_mesh(Strategy(fsdp=8)))
    assert shard_state(shapes, abstract_mesh(Strategy(fsdp=8)), strict=False)["odd"]["kernel"].spec == PartitionSpec()


def test_a_strategy_that_splits_nothing_is_refused():
    with pytest.raises(ValueError, match=r"tensor=4 does not divide axis 1 of params/query/kernel.*: use fsdp=2,tens"):
        shard_state(jax.eval_shape(state), abstract_mesh(Strategy(fsdp=2, tensor=4)))
    small = {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    with pytest.raises(ValueError, match=r"fsdp=8 splits no parameter.*: use data for these devices"):
        shard_state(small, abstract_mesh(Strategy(fsdp=8)))


@pytest.mark.parametrize(("rows", "nearest"), [(10, "8 or 16"), (3, "8"), (0, "8")])
def test_batch_that_does_not_divide_names_what_works(rows: int, nearest: str):
    mesh = abstract_mesh(Strategy(2, 4))
    check_batch_size(16, mesh)
    with pytest.raises(ValueError, match=rf"batch of {rows} .* 8 devices \(data=2 x fsdp=4\): use {nearest}$"):
        check_batch_size(rows, mesh)
    with pytest.raises(ValueError, match=r"batch of 24 .* in 2 micro-batches: use 16 or 32$"):
        check_batch_size(24, mesh, accumulate=2)


def test_batch_arrives_as_it_was():
    mesh = make_mesh(devices=jax.devices()[:1])
    batch = Batch(
        np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3), np.ones((2, 5), np.int32), np.ones((2, 5), bool)
    )
    placed = put_batch(batch, mesh)
    assert placed.low is None and placed.image.sharding.is_equivalent_to(batch_sharding(mesh), 4)
    assert replicated(mesh).is_fully_replicated
    np.testing.assert_array_equal(placed.image, batch.image)


class Placed:
    """A device of a host, for meshes that are only asked where rows lie."""

    device_kind, platform = "cpu", "cpu"

    def __init__(self, number: int, host: int) -> None:
        self.id, self.process_index = number, host


def test_hosts_read_the_rows_of_their_devices():
    """Of devices in an order as a torus has it, and with tensor across hosts, which then read the same rows."""
    devices = np.array([Placed(i, host) for i, host in enumerate([0, 0, 1, 1, 0, 0, 1, 1])])

    def rows(strategy: Strategy, host: int) -> list[int]:
        mesh = Mesh(devices.reshape(strategy[:4]), sharding.AXES)
        return host_rows(mesh, 16, host).tolist()

    assert rows(Strategy(2, 4), 0) == [0, 1, 2, 3, 8, 9, 10, 11] and rows(Strategy(8), 1) == [
        4,
        5,
        6,
        7,
        12,
        13,
        14,
        15,
    ]
    assert rows(Strategy(2, tensor=4), 0) == rows(Strategy(2, tensor=4), 1) == list(range(16))
    assert rows(Strategy(4, spatial=2), 0) == [0, 1, 2, 3, 8, 9, 10, 11]


ON_EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from unclip_jax import sharding
from unclip_jax.contrastive import contrastive
from unclip_jax.models.unet_blocks import ResBlock
from unclip_jax.sharding import make_mesh, on, put_batch, shard_state

mesh = make_mesh("data=2,fsdp=4")
init = lambda key: {"kernel": jax.random.normal(key, (256, 128))}
shardings = shard_state(jax.eval_shape(init, jax.random.key(0)), mesh)
params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
assert params["kernel"].addressable_shards[0].data.shape == (64, 128)
rows = put_batch(np.arange(16 * 256, dtype=np.float32).reshape(16, 256) / 4096, mesh)
assert rows.addressable_shards[0].data.shape == (2, 256)
constrained = jax.jit(lambda x: sharding.rows(2 * x))
picture = np.ones((8, 4, 4, 3), np.float32)
with on(make_mesh("data=4,spatial=2")):
    assert constrained(picture).addressable_shards[0].data.shape == (2, 2, 4, 3)
assert len(constrained(picture).sharding.device_set) == 1  # what was traced on a mesh is not taken for another's
assert jax.random.bits(jax.random.key(0), (2,)).tolist() == jax.jit(
    lambda key: sharding.rows(jax.random.bits(key, (2,))))(jax.random.key(0)).tolist()

rng = np.random.default_rng(0)

# Kernels split in memory, and rows of pixels of a single picture: what XLA's partitioner would get wrong by itself.
sharding.rules.SMALL = 16
block = ResBlock(16, groups=4, epsilon=1e-5, dtype="float32")
picture, time = np.float32(np.random.default_rng(1).normal(size=(1, 8, 8, 16))), np.ones((1, 8), np.float32)
noisy = lambda x: x + 0.1 * np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
params = jax.tree.map(noisy, block.init(jax.random.key(0), picture, time)["params"])
apply = jax.jit(lambda params: sharding.rows(block.apply({"params": params}, picture, time)))
with on(make_mesh("fsdp=2,spatial=4")):
    placed = sharding.place(params)
    assert placed["conv_0"]["kernel"].addressable_shards[0].data.size == 9 * 16 * 16 // 2
    split = apply(placed)
assert split.addressable_shards[0].data.shape == (1, 2, 8, 16)
with on(make_mesh("data=2,spatial=4")):
    sharding.check_height(8)
    try:
        sharding.check_height(6)
    except ValueError as error:
        assert "spatial=4 does not divide the 6 rows of these pictures: use spatial=2 and" in str(error)
    else:
        raise AssertionError
np.testing.assert_allclose(split, apply(params), atol=1e-5)

# Rows of a table whose channels are split: these are exchanged, and no device has the table or its gradient whole.
words, ids = np.float32(rng.normal(size=(96, 32))), rng.integers(0, 96, (16, 5))
weight = np.float32(rng.normal(size=(16, 5, 32)))
chosen = lambda table, ids, weight: (sharding.lookup("tokens", jnp.float32)(table, ids) ** 2 * weight).sum()
with on(mesh):
    there = shard_state({"tokens": {"embedding": words}}, mesh)["tokens"]["embedding"]
    assert there.shard_shape(words.shape) == (96, 8)
    given = jax.device_put(words, there), *put_batch((ids, weight), mesh)
    apart = jax.jit(jax.value_and_grad(chosen), out_shardings=(None, there)).lower(*given).compile()
    (value, slope), text = apart(*given), apart.as_text()
assert "all-to-all" in text and "f32[96,32]" not in text
expected, whole = jax.value_and_grad(lambda table: (table[ids] ** 2 * weight).sum())(words)
np.testing.assert_allclose(value, expected, rtol=1e-5)
np.testing.assert_allclose(slope, whole, rtol=1e-5, atol=1e-6)

# They travel in the type of computation, forward and back; what a word's places give is summed in the table's.
same = jnp.zeros((1024, 5), jnp.int32)
many = lambda table, ids: sharding.lookup("tokens", jnp.bfloat16)(table, ids).astype(jnp.float32).sum()
with on(mesh):
    lowered = jax.jit(jax.value_and_grad(many)).lower(given[0], put_batch(same, mesh))
    moved = [line for line in lowered.as_text().splitlines() if "stablehlo.all_to_all" in line]
    assert len(moved) == 2 and all("xbf16>) ->" in line for line in moved), moved
    slopes = lowered.compile()(given[0], put_batch(same, mesh))[1], jax.grad(many)(words, same)
for slope in slopes:
    np.testing.assert_array_equal(slope[0], same.size)  # in bfloat16, 256 + 1 is 256

def plain(image, text, scale, tokens):
    logits = scale * jnp.einsum("iz,tz->it", image, text, precision="highest")
    same = jnp.all(tokens[:, None] == tokens[None], axis=-1) & ~jnp.eye(len(logits), dtype=bool)
    logits = jnp.where(same, -1e9, logits)
    right = jnp.arange(len(logits))
    by_image = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=1), right[:, None], 1)
    by_text = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=0), right[None], 0)
    return -(by_image.mean() + by_text.mean()) / 2, (jnp.argmax(logits, axis=0) == right).mean()

unit = lambda x: np.float32(x / np.linalg.norm(x, axis=1, keepdims=True))
text = unit(rng.normal(size=(64, 16)))
image, tokens = unit(text + 0.3 * rng.normal(size=text.shape)), rng.integers(0, 3, (64, 3)).astype(np.int32)
gradient = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))
(value, hits), grads = gradient(plain)(image, text, np.float32(20), tokens)
ring = gradient(contrastive)
with on(mesh):
    (there, found), others = ring(*put_batch((image, text), mesh), np.float32(20), put_batch(tokens, mesh))
    assert others[0].addressable_shards[0].data.shape == (8, 16)
here = ring(image, text, np.float32(20), tokens)
for (loss, share), slopes in (((there, found), others), here):
    assert abs(loss - value) <= 1e-6 * value and share == hits and 0 < hits < 1
    for a, b in zip(slopes, grads):
        assert np.abs(a - b).max() <= 2e-6 * np.abs(b).max()

def bytes_of(ways, batch):
    mesh = make_mesh("dp", jax.devices()[:ways])
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding.batch_sharding(mesh))
    arguments = shape(batch, 64), shape(batch, 64), jax.ShapeDtypeStruct((), jnp.float32), shape(batch, 16, dtype=int)
    with on(mesh):
        return ring.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

few, more, wider = bytes_of(4, 2048), bytes_of(4, 4096), bytes_of(8, 4096)
assert 1.8 < more / few < 2.2 and 0.9 < wider / few < 1.1 and more < 4096 ** 2 * 4 / 4, (few, more, wider)
"""

FAKE = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def test_eight_devices_know_their_mesh_exchange_looked_up_rows_and_share_the_contrastive_loss():
    """Values and gradients are the plain ones; the loss's memory is that of batch / devices rows."""
    done = subprocess.run([sys.executable, "-c", ON_EIGHT], env=FAKE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_only_several_tpus_are_asked_for_more_than_their_compilers_defaults(monkeypatch):
    monkeypatch.setattr(Placed, "platform", "tpu")
    chips = np.array([Placed(number, 0) for number in range(4)]).reshape(4, 1, 1, 1)
    mesh, one = Mesh(chips, AXES), Mesh(chips[:1], AXES)
    assert compiler_options(make_mesh()) == {} and compiler_options(one) == {}
    split = Mesh(chips.reshape(1, 2, 2, 1), AXES)
    assert compiler_options(mesh) == GATHER_WHILE_COMPUTING | WHOLE_WEIGHTS  # planned here, compiled for there
    assert compiler_options(split) == GATHER_WHILE_COMPUTING  # whose rows travel, not weights
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.warns(UserWarning, match="training without the options for TPUs"):
        assert compiler_options(mesh) == {}  # as if this compiler, which knows no such option, were a TPU's


@pytest.mark.parametrize(
    "arguments",
    [
        "--stages prior --strategies dp fsdp tp hsdp spatial",
        "--stages clip ar_prior sampling --strategies data=2,fsdp=2,tensor=2",
        "--stages decoder upsampler_256 upsampler_1024 --shallow decoder upsampler_256 upsampler_1024 "
        "--strategies fsdp=2,tensor=2,spatial=2",
    ],
)
def test_every_strategy_trains_as_one_device_does(arguments, tmp_path):
    """tests/sharding_matrix.py runs all stages under all strategies."""
    script, out = Path(__file__).parent / "sharding_matrix.py", tmp_path / "matrix.json"
    command = [sys.executable, str(script), *arguments.split(), "--out", str(out)]
    done = subprocess.run(command, env=FAKE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    table = json.loads(out.read_text())
    trained = [row for row in table["rows"] if row["strategy"] not in ("dp", "spatial") and "split" in row]
    assert trained and all(row["split"] > 0 for row in trained)
