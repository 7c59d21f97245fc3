import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unclip_jax.config import OptimConfig
from unclip_jax.optim import decay_mask, ema_update, join_vectors, learning_rate, map_like, optimizer, part_vectors

PARAMS = {
    "attention": {"kernel": np.ones((4, 8), np.float32), "bias": np.ones((4, 2), np.float32)},
    "norm": {"scale": np.ones(4, np.float32), "kernel": np.ones(4, np.float32)},
    "tokens": {"embedding": np.ones((5, 4), np.float32)},
    "position": {"embedding": np.ones((3, 4), np.float32)},
    "position_embedding": np.ones((3, 4), np.float32),
    "null_text": {"embedding": np.ones((3, 4), np.float32)},
    "logit_scale": np.ones((), np.float32),
}


def test_only_matrices_decay():
    decaying = {
        jax.tree_util.keystr(path) for path, on in jax.tree_util.tree_leaves_with_path(decay_mask(PARAMS)) if on
    }
    assert decaying == {"['attention']['kernel']", "['tokens']['embedding']"}


def test_update_without_gradient_shrinks_decaying_leaves_alone():
    config = OptimConfig(learning_rate=0.5, warmup=1, weight_decay=0.1)
    transformation = optimizer(config, jax.eval_shape(lambda: PARAMS))
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    updates, _ = jax.jit(transformation.update)(zeros, transformation.init(PARAMS), PARAMS)
    for update, decays in zip(jax.tree.leaves(updates), jax.tree.leaves(decay_mask(PARAMS)), strict=True):
        np.testing.assert_allclose(update, -0.05 if decays else 0.0, rtol=1e-6)


def test_clipping_bounds_the_gradient_that_the_moments_see():
    params = {"bias": np.zeros(4, np.float32)}
    transformation = optimizer(OptimConfig(clip_norm=1.0, beta1=0.0), params)
    _, state = jax.jit(transformation.update)(
        {"bias": np.full(4, 50.0, np.float32)}, transformation.init(params), params
    )
    moments = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    np.testing.assert_allclose(np.linalg.norm(moments.mu["bias"]), 1.0, rtol=1e-6)


@pytest.mark.parametrize("decay_steps", [None, 100])
def test_learning_rate_warms_up_and_decays(decay_steps: int | None):
    config = OptimConfig(learning_rate=2e-3, warmup=10, decay_steps=decay_steps, final_fraction=0.1)
    rates = np.array(
        [learning_rate(config, step) for step in range(12)] + [learning_rate(config, 60), learning_rate(config, 500)]
    )
    np.testing.assert_allclose(rates[:10], 2e-4 * np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(rates[10], 2e-3, rtol=1e-6)
    np.testing.assert_allclose(rates[-2:], [1.1e-3, 2e-4] if decay_steps else [2e-3, 2e-3], rtol=1e-5)


@pytest.mark.parametrize("step", [0, 7, 8981, 10**6])
def test_average_warms_up(step: int):
    average = ema_update({"a": jnp.zeros(3)}, {"a": jnp.ones(3)}, jnp.int32(step), 0.999)
    np.testing.assert_allclose(average["a"], 1 - min(0.999, (1 + step) / (10 + step)), rtol=1e-3)


def test_average_of_a_constant_is_the_constant_bitwise():
    params = {"a": jax.random.normal(jax.random.key(0), (64,))}
    assert (ema_update(params, params, 3, 0.999)["a"] == params["a"]).all()


def test_muon_takes_steps_of_equal_size_in_every_direction_of_a_matrix():
    params = {"hidden": {"kernel": np.zeros((3, 3, 4, 8), np.float32), "bias": np.zeros(8, np.float32)}}
    gradient = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), params)
    gradient["hidden"]["kernel"][..., 0] *= 100
    config = OptimConfig(kind="muon", learning_rate=1.0, warmup=1, weight_decay=0.0, clip_norm=1e9)
    transformation = optimizer(config, params)
    updates, _ = jax.jit(transformation.update)(gradient, transformation.init(params), params)
    sizes = np.linalg.svd(np.reshape(updates["hidden"]["kernel"], (36, 8)), compute_uv=False)
    raw = np.linalg.svd(np.reshape(gradient["hidden"]["kernel"], (36, 8)), compute_uv=False)
    assert raw.max() / raw.min() > 50
    assert sizes.max() / sizes.min() < 2
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(updates["hidden"]["kernel"]))), 0.2, rtol=0.3)


def test_muon_leaves_vectors_and_the_ends_of_a_network_to_adam():
    matrix = np.ones((3, 3, 4, 8), np.float32)
    params = {"unet": {name: {"kernel": matrix} for name in ("stem", "out", "middle")}, "null": np.ones(4, np.float32)}
    state = optimizer(OptimConfig(kind="muon"), params).init(params)
    held = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    second_moments = {path for path in held if ".nu" in path}
    assert any("stem" in path for path in second_moments)
    assert any("'out'" in path for path in second_moments)
    assert any("null" in path for path in second_moments)
    assert not any("middle" in path for path in second_moments)


def test_short_vectors_are_joined_and_parted_again():
    params = {"a": {"bias": np.arange(3.0), "kernel": np.ones((2, 3))}, "scale": np.array(7.0), "z": np.arange(4.0) + 9}
    joined = join_vectors(params)
    np.testing.assert_array_equal(joined["vectors"], [0, 1, 2, 7, 9, 10, 11, 12])
    assert [leaf.ndim for leaf in jax.tree.leaves(joined)] == [2, 1]
    jax.tree.map(np.testing.assert_array_equal, part_vectors(joined, params), params)
    state = map_like(join_vectors, (optax.ScaleByAdamState(np.int32(3), params, params), 5), params)
    assert set(state[0].nu) == {"a", "vectors", "scale", "z"} and state[0].count == 3 and state[1] == 5
