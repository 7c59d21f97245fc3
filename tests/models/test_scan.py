"""Scanned layers are the same network as layers side by side: in value, gradient, sharding, decay, Muon and FLOPs.

tests/sharding_matrix.py trains them on meshes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax import sharding
from unclip_jax.config import ClipConfig, OptimConfig, TransformerConfig
from unclip_jax.interop.clip import clip_tensors
from unclip_jax.models.clip import Clip
from unclip_jax.models.stacking import stack_blocks, unstack_blocks
from unclip_jax.models.transformer import Transformer, empty_memory
from unclip_jax.optim import decay_mask, optimizer
from unclip_jax.plan.flops import count
from unclip_jax.sharding.rules import split_axes

CONFIG = TransformerConfig(width=16, layers=3, heads=4, causal=True)
SCANNED = replace(CONFIG, scan=True)
X = jnp.asarray(np.random.default_rng(1).normal(size=(8, 6, 16)), jnp.float32)
MASK = jnp.arange(6)[None] < jnp.array([[4], [6]] * 4)


@pytest.fixture(scope="module")
def params():
    start = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), X)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.25, x.shape), jnp.float32), start)


def loss(config, params, x):
    return jnp.sin(Transformer(config).apply({"params": params}, x, MASK)).sum()


@pytest.fixture(scope="module")
def unrolled(params):
    return jax.jit(jax.value_and_grad(partial(loss, CONFIG), (0, 1)))(params, X)


def assert_same(found, value, of_params, of_x):
    got, (grads, to_x) = found
    np.testing.assert_allclose(got, value, rtol=1e-6)
    expected = stack_blocks(of_params), of_x
    least = 1e-3 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))  # keys' biases have no gradient
    for a, b in zip(jax.tree.leaves((grads, to_x)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), least))


@pytest.mark.parametrize("remat", ["none", "products"])
def test_value_and_gradient_are_those_of_layers_side_by_side(params, unrolled, remat):
    config = replace(SCANNED, remat=remat)
    value, gradients = unrolled
    assert_same(jax.jit(jax.value_and_grad(partial(loss, config), (0, 1)))(stack_blocks(params), X), value, *gradients)


def test_tokens_after_a_memory_are_those_of_the_whole_sequence(params):
    stacked, module = {"params": stack_blocks(params)}, Transformer(SCANNED)

    @jax.jit
    def cached(x):
        call = partial(module.apply, stacked, method="extend")
        first, memory = call(x[:, :2], empty_memory(SCANNED, len(x), 6), 0, MASK)

        def step(memory, place):
            state, memory = call(jax.lax.dynamic_slice_in_dim(x, place, 1, 1), memory, place, MASK)
            return memory, state[:, 0]

        return jnp.concatenate([first, jax.lax.scan(step, memory, jnp.arange(2, 6))[1].swapaxes(0, 1)], axis=1)

    whole = jax.jit(lambda x: module.apply(stacked, x, MASK))(X)
    np.testing.assert_allclose(cached(X), whole, rtol=1e-5, atol=1e-5)


def test_every_layer_starts_and_drops_out_on_its_own():
    config = replace(SCANNED, layers=2, dropout=0.5)
    start = jax.jit(Transformer(config).init)(jax.random.key(0), X)["params"]
    kernel = start["block"]["mlp_in"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])

    # Both layers add ones alone, which dropout makes 0 or 2: only unlike masks add up to 2.
    ones = jax.tree.map(jnp.zeros_like, start)
    ones["block"]["project"]["bias"] += 1.0
    added = Transformer(config).apply({"params": ones}, X, None, False, rngs={"dropout": jax.random.key(1)}) - X
    assert set(np.unique(np.round(np.asarray(added)))) == {0.0, 2.0, 4.0}


def test_stacking_is_undone_and_gives_the_tree_of_a_scanned_network(params):
    tree = {"text": {"transformer": params, "norm": {"scale": np.ones(3)}}}
    stacked = stack_blocks(tree)
    shapes = jax.eval_shape(Transformer(SCANNED).init, jax.random.key(0), X)["params"]
    assert jax.tree.map(jnp.shape, stacked["text"]["transformer"]) == jax.tree.map(jnp.shape, shapes)
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked), tree)
    assert jax.tree.structure(stack_blocks(stacked)) == jax.tree.structure(stacked)


def test_a_scanned_clip_is_exported_block_by_block():
    tower = replace(CONFIG, layers=2)
    config = ClipConfig(16, 32, 16, replace(tower, causal=False), tower, vocab_size=50, context_length=12)
    shapes = jax.eval_shape(Clip(config).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 12), int))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes["params"])
    scanned = replace(config, vision=replace(config.vision, scan=True), text=replace(tower, scan=True))
    ours, theirs = clip_tensors(stack_blocks(params), scanned), clip_tensors(params, config)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(tensor))


def test_layers_are_split_like_one_layer_and_never_apart():
    mesh = sharding.abstract_mesh(sharding.Strategy(fsdp=8, tensor=2))
    for name, shape in (
        ("query/kernel", (2048, 32, 64)),
        ("project/kernel", (32, 64, 2048)),
        ("mlp_in/bias", (65536,)),
    ):
        alone, stacked = split_axes(name, shape, mesh), split_axes(f"text/block/{name}", (64, *shape), mesh)
        assert stacked == (None, *alone) and "tensor" in alone
    # Large in all, small by the layer: gathering it once per layer would cost more than it saves.
    assert not any(split_axes("text/block/norm_mlp/scale", (64, 2048), mesh))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_update_is_that_of_the_layers_side_by_side(params, kind):
    config = OptimConfig(kind=kind, learning_rate=0.1, warmup=1, weight_decay=0.3)
    gradient = jax.tree.map(lambda x: jnp.cos(40 * x), params)

    def updated(params, gradient):
        descend = optimizer(config, params)
        return descend.update(gradient, descend.init(params), params)[0]

    with jax.default_matmul_precision("highest"):  # muon's own products
        expected = jax.jit(updated)(params, gradient)
        found = jax.jit(updated)(stack_blocks(params), stack_blocks(gradient))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(stack_blocks(expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    assert decay_mask(stack_blocks(params))["block"] == decay_mask(params)["block_0"]


def test_flops_are_those_of_the_layers_side_by_side(params):
    for remat in ("none", "block"):
        a, b = (
            count(jax.make_jaxpr(jax.grad(partial(loss, replace(config, remat=remat)), (0, 1)))(tree, X))
            for config, tree in ((CONFIG, params), (SCANNED, stack_blocks(params)))
        )
        assert a.total == b.total and sum(a.again.values()) == sum(b.again.values())
        assert bool(sum(a.again.values())) == (remat == "block")
