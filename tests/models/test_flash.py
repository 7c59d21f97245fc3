"""The kernel against attention with logits, in Pallas' interpreter, and what it leaves to logits."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from unclip_jax.models import flash
from unclip_jax.models.transformer import attend
from unclip_jax.plan import flops

SHAPES = {
    "pairs of heads": (300, 300, 2, 64, False),  # queries, keys, heads, channels, causal
    "an odd head": (64, 324, 3, 64, False),
    "causal": (300, 300, 2, 64, True),
    "whole lanes": (128, 160, 1, 128, False),
    "channels that fill nothing": (70, 70, 2, 80, True),
    "four to the lanes": (64, 64, 4, 32, False),
}
ON_EIGHT = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import pallas
from unclip_jax import sharding
from unclip_jax.models.flash import attend_blocks

pallas.pallas_call = functools.partial(pallas.pallas_call, interpret=True)
rng = np.random.default_rng(0)
for heads, causal in ((2, False), (6, False), (2, True)):  # a half, three of two devices, and places that matter
    shapes = [(8, n, heads, 64) for n in (128, 128 if causal else 160, 128 if causal else 160)]
    inputs = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    mask = jnp.asarray(rng.random((8, 1, 1, shapes[1][1])) < 0.7).at[..., 0].set(True)
    attention = jax.jit(lambda *inputs: attend_blocks(*inputs, mask, causal))
    alone = attention(*inputs)
    for strategy in ("data=2,tensor=2,spatial=2", "fsdp=8"):
        with sharding.on(sharding.make_mesh(strategy)):
            split = attention(*inputs)
        assert len(split.sharding.device_set) == 8
        assert jnp.array_equal(split, alone), (heads, causal, strategy)
"""


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))


def _inputs(queries, keys, heads, channels):
    rng = np.random.default_rng(0)
    shapes = [(2, n, heads, channels) for n in (queries, keys, keys, queries)]
    *inputs, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    return inputs, jnp.asarray(rng.random((2, 1, 1, keys)) < 0.7).at[..., 0].set(True), cotangent


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_equals_logits_in_value_and_gradient(shape):
    *sizes, causal = shape
    inputs, mask, cotangent = _inputs(*sizes)
    found, back = jax.vjp(lambda *inputs: flash.attend_blocks(*inputs, mask, causal), *inputs)
    gradients = back(cotangent)
    wide = [x.astype(jnp.float32) for x in inputs]
    expected, back = jax.vjp(lambda *inputs: attend(*inputs, mask, jax.lax.Precision.HIGHEST, causal), *wide)
    for ours, theirs in zip((found, *gradients), (expected, *back(cotangent.astype(jnp.float32))), strict=True):
        distance = np.linalg.norm(ours.astype(np.float32) - theirs) / np.linalg.norm(theirs)
        assert distance < 0.01  # bfloat16 rounds by 0.4%


@pytest.mark.usefixtures("interpreted")
def test_what_a_query_may_not_see_changes_nothing():
    (query, key, value), mask, _ = _inputs(128, 128, 2, 64)

    def both(value):
        masked = flash.attend_blocks(query, key, value, mask)
        return masked, flash.attend_blocks(query, key, value, None, causal=True)[:, :100]

    before = both(value)
    hidden = jnp.where(mask[:, 0, 0, :, None, None], value, 7.0)
    later = jnp.where(jnp.arange(128)[:, None, None] < 100, value, 7.0)
    assert jnp.array_equal(both(hidden)[0], before[0])
    assert jnp.array_equal(both(later)[1], before[1])


def test_kernel_is_the_same_on_a_mesh():
    fake = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", ON_EIGHT], env=fake, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_flops_are_those_of_attention_with_logits():
    inputs, mask, cotangent = _inputs(300, 324, 3, 64)

    def count(attention):
        def both(*inputs):
            return jax.vjp(jax.checkpoint(lambda *inputs: jnp.sin(attention(*inputs))), *inputs)[1](cotangent)

        work = flops.count(jax.make_jaxpr(both)(*inputs))
        return work.total, sum(work.again.values())

    found = count(lambda *inputs: flash.attend_blocks(*inputs, mask))
    assert found == count(lambda *inputs: attend(*inputs, mask, None)) and found[1] == found[0] / 3


def test_what_the_kernel_takes(monkeypatch):
    (query, key, _), mask, _ = _inputs(64, 100, 2, 64)
    assert not flash.suits(query, key, mask)  # here is no TPU
    monkeypatch.setattr(flash, "platform", lambda: "tpu")
    assert flash.suits(query, key, mask) and flash.suits(query, key, None)
    assert not flash.suits(query.astype(jnp.float32), key, mask)
    assert not flash.suits(query[:, :60], key, mask)
    assert not flash.suits(query, jnp.zeros((2, 2049, 2, 64), jnp.bfloat16), None)
    assert not flash.suits(query, key, jnp.ones((2, 1, 64, 100), bool))
