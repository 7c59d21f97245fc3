import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from unclip_jax.config import OptimConfig
from unclip_jax.optim import optimizer
from unclip_jax.sharding import batch_sharding, check_batch_size, make_mesh, put_batch, replicated, shard_state
from unclip_jax.types import Batch, TrainState


def abstract_mesh(data: int, fsdp: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def state() -> TrainState:
    params = {
        "stem": {"kernel": jnp.zeros((3, 3, 3, 320)), "bias": jnp.zeros(320)},
        "block": {"kernel": jnp.zeros((3, 3, 320, 640)), "bias": jnp.zeros(640)},
        "mlp": {"kernel": jnp.zeros((640, 2560)), "bias": jnp.zeros(2560)},
        "tokens": {"embedding": jnp.zeros((49407, 640))},
    }
    opt_state = optimizer(OptimConfig(), params).init(params)
    return TrainState(jnp.int32(0), params, params, opt_state, jnp.int32(0))


def test_state_is_split_evenly_and_moments_lie_with_parameters():
    shapes = jax.eval_shape(state)
    shardings = shard_state(shapes, abstract_mesh(1, 8))
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    each = sum(math.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in pairs)
    assert total / 8 <= each <= 1.05 * total / 8
    assert shardings.params == shardings.ema == shardings.opt_state[1].mu == shardings.opt_state[1].nu


def test_largest_divisible_axis_is_split_and_small_leaves_are_not():
    shapes = jax.eval_shape(state)
    specs = jax.tree.map(lambda sharding: sharding.spec, shard_state(shapes, abstract_mesh(1, 8)).params)
    assert specs["block"]["kernel"] == PartitionSpec(None, None, None, "fsdp")
    assert specs["tokens"]["embedding"] == PartitionSpec(None, "fsdp")  # 49407 is odd
    assert specs["stem"]["kernel"] == specs["mlp"]["bias"] == PartitionSpec()
    assert all(
        sharding.spec == PartitionSpec() for sharding in jax.tree.leaves(shard_state(shapes, abstract_mesh(8, 1)))
    )


def test_a_giant_that_cannot_be_split_is_refused_by_name():
    shapes = {"odd": {"kernel": jax.ShapeDtypeStruct((5001, 5001), jnp.float32)}}
    with pytest.raises(ValueError, match=r"odd.*kernel.*5001.*fsdp=8"):
        shard_state(shapes, abstract_mesh(1, 8))


@pytest.mark.parametrize(("rows", "nearest"), [(10, "8 or 16"), (3, "8"), (0, "8")])
def test_batch_that_does_not_divide_names_what_works(rows: int, nearest: str):
    check_batch_size(16, abstract_mesh(2, 4))
    with pytest.raises(ValueError, match=rf"batch of {rows} .* 8 devices \(data=2 x fsdp=4\): use {nearest}$"):
        check_batch_size(rows, abstract_mesh(2, 4))


def test_mesh_sizes_are_checked():
    devices = jax.devices()[:1]
    assert dict(make_mesh(devices=devices).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="data=1, fsdp=2, tensor=1 does not fit 1 devices"):
        make_mesh(1, 2, devices=devices)
    with pytest.raises(ValueError, match="at most one is -1"):
        make_mesh(-1, -1, devices=devices)


def test_batch_arrives_as_it_was():
    mesh = make_mesh(devices=jax.devices()[:1])
    batch = Batch(
        np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3), np.ones((2, 5), np.int32), np.ones((2, 5), bool)
    )
    placed = put_batch(batch, mesh)
    assert placed.low is None and placed.image.sharding.is_equivalent_to(batch_sharding(mesh), 4)
    assert replicated(mesh).is_fully_replicated
    np.testing.assert_array_equal(placed.image, batch.image)


ON_EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from unclip_jax.sharding import make_mesh, put_batch, shard_state
mesh = make_mesh(data=2, fsdp=4)
init = lambda key: {"kernel": jax.random.normal(key, (256, 128))}
shardings = shard_state(jax.eval_shape(init, jax.random.key(0)), mesh)
params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
assert params["kernel"].addressable_shards[0].data.shape == (64, 128)
rows = put_batch(np.arange(16 * 256, dtype=np.float32).reshape(16, 256) / 4096, mesh)
assert rows.addressable_shards[0].data.shape == (2, 256)
loss = lambda params, rows: jnp.mean(jnp.dot(rows, params["kernel"], precision="highest") ** 2)
there = jax.jit(jax.value_and_grad(loss))(params, rows)
here = jax.jit(jax.value_and_grad(loss))(*jax.device_get((params, rows)))
for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(here)):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)
"""


def test_eight_devices_compute_what_one_does():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
