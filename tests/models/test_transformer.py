from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.config import TransformerConfig
from unclip_jax.models.transformer import Transformer, attend, quick_gelu

CONFIG = TransformerConfig(width=16, layers=2, heads=4, causal=True)
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 16)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    start = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), X)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.25, x.shape), jnp.float32), start)


@partial(jax.jit, static_argnums=0)
def run(config: TransformerConfig, params, x, mask=None):
    return Transformer(config).apply(params, x, mask)


def test_attention_is_softmax_of_scaled_products():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, n, 3, 5)), jnp.float32) for n in (4, 6, 6))
    mask = rng.random((2, 1, 4, 6)) < 0.7
    mask[..., 0] = True
    got = attend(query, key, value, jnp.asarray(mask), jax.lax.Precision.HIGHEST)
    for b in range(2):
        for head in range(3):
            logits = np.asarray(query[b, :, head], float) @ np.asarray(key[b, :, head], float).T / np.sqrt(5)
            weights = np.where(mask[b, 0], np.exp(logits), 0)
            expected = weights / weights.sum(1, keepdims=True) @ np.asarray(value[b, :, head], float)
            np.testing.assert_allclose(got[b, :, head], expected, rtol=1e-5, atol=1e-6)


def test_no_state_depends_on_a_later_token(params):
    """The gradient of state i with respect to token j is zero exactly where j > i."""
    states = partial(Transformer(CONFIG).apply, params)
    jacobian = jax.jit(jax.jacrev(lambda x: states(x[None])[0].sum(-1)))(X[0])
    influence = np.abs(np.asarray(jacobian)).max(-1)
    later = np.triu(np.ones((6, 6), bool), 1)
    assert (influence[later] == 0).all() and (influence[~later] > 1e-6).all()


def test_without_causality_order_is_unknown(params):
    config = replace(CONFIG, causal=False)
    order = np.array([3, 0, 5, 1, 4, 2])
    forward, permuted = run(config, params, X), run(config, params, X[:, order])
    np.testing.assert_allclose(forward[:, order], permuted, rtol=1e-5, atol=1e-5)
    assert not np.allclose(forward, run(CONFIG, params, X), atol=1e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_masked_tokens_have_no_influence(params, causal):
    config = replace(CONFIG, causal=causal)
    mask = jnp.array([[True, True, True, True, False, False], [True, True, False, True, True, True]])
    garbage = jnp.where(mask[..., None], X, 1e4)
    a, b = run(config, params, X, mask), run(config, params, garbage, mask)
    assert np.array_equal(np.asarray(a)[mask], np.asarray(b)[mask])
    assert not np.allclose(np.asarray(a)[mask], np.asarray(run(config, params, X))[mask], atol=1e-3)


def test_a_masked_row_equals_the_shorter_row(params):
    mask = jnp.arange(6)[None] < jnp.array([[4], [6]])
    np.testing.assert_allclose(run(CONFIG, params, X, mask)[0, :4], run(CONFIG, params, X[:1, :4])[0], atol=1e-5)


def test_bfloat16_computes_about_the_same(params):
    exact, coarse = run(CONFIG, params, X), run(replace(CONFIG, dtype="bfloat16"), params, X)
    assert coarse.dtype == jnp.bfloat16
    error = jnp.linalg.norm(coarse.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 1e-5 < error < 2e-2  # a few roundings of 2^-9


def test_sizes_follow_the_config():
    def count(config: TransformerConfig) -> int:
        shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), X)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    # query, key, value and project; the MLP's two layers; two norms.
    assert count(CONFIG) == 2 * (4 * (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16) + 4 * 16)
    inner = 4 * 8
    expected = 2 * (3 * (16 * inner + inner) + (inner * 16 + 16) + (16 * 32 + 32) + (32 * 16 + 16) + 4 * 16)
    assert count(replace(CONFIG, head_dim=8, mlp_ratio=2.0)) == expected


def test_activations(params):
    x = jnp.linspace(-4, 4, 9)
    np.testing.assert_allclose(quick_gelu(x), x / (1 + np.exp(-1.702 * x)), rtol=1e-5, atol=1e-6)
    quick = run(replace(CONFIG, activation="quick_gelu"), params, X)
    assert 1e-5 < np.abs(np.asarray(quick - run(CONFIG, params, X))).max() < 0.2


def test_dropout_needs_its_key_and_training(params):
    config = replace(CONFIG, dropout=0.5)
    still = run(config, params, X)
    np.testing.assert_allclose(still, run(CONFIG, params, X), atol=1e-6)

    @jax.jit
    def dropped(key):
        return Transformer(config).apply(params, X, deterministic=False, rngs={"dropout": key})

    a, b = (dropped(jax.random.key(k)) for k in (0, 1))
    assert not np.allclose(a, b) and not np.allclose(a, still)
