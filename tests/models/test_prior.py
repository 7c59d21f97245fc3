from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.config import PriorConfig, TransformerConfig
from unclip_jax.models.prior import Prior, Whitening

CONFIG = PriorConfig(
    embedding_dim=8,
    text_dim=12,
    context_length=5,
    transformer=TransformerConfig(width=16, layers=1, heads=2, causal=True),
)


def inputs() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {
        "x": jnp.asarray(rng.normal(size=(2, 8)), jnp.float32),
        "t": jnp.array([10, 900]),
        "text_states": jnp.asarray(rng.normal(size=(2, 5, 12)), jnp.float32),
        "text_mask": jnp.array([[True, True, True, False, False], [True, True, True, True, True]]),
        "text_embedding": jnp.asarray(rng.normal(size=(2, 8)), jnp.float32),
    }


@pytest.fixture(scope="module")
def params():
    start = jax.eval_shape(partial(Prior(CONFIG).init, **inputs()), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.25, x.shape), jnp.float32), start)


@partial(jax.jit, static_argnums=0)
def apply(config: PriorConfig, params, given: dict[str, Any]):
    return Prior(config).apply(params, **given)


def run(params, changes: dict[str, Any] | None = None, config: PriorConfig = CONFIG):
    return apply(config, params, inputs() | (changes or {}))


@jax.jit
def states(params, given: dict[str, Any]):
    """The transformer's output at every place: five states, text embedding, time, noised embedding, query."""
    _, seen = Prior(CONFIG).apply(
        params, **given, capture_intermediates=lambda module, _: module.name == "transformer", mutable="intermediates"
    )
    return seen["intermediates"]["transformer"]["__call__"][0]  # type: ignore[index]


def test_padding_has_no_influence(params):
    given = inputs()
    garbage = jnp.where(given["text_mask"][..., None], given["text_states"], 1e4)
    assert np.array_equal(run(params), run(params, {"text_states": garbage}))
    assert not np.allclose(run(params), run(params, {"text_mask": jnp.ones((2, 5), bool)}), atol=1e-3)


def test_everything_told_has_influence(params):
    base = run(params)
    assert base.shape == (2, 8) and base.dtype == jnp.float32
    for name, value in inputs().items():
        if name != "text_mask":
            other = value + 50 if name == "t" else -value
            assert (np.abs(np.asarray(run(params, {name: other}) - base)).max(-1) > 1e-3).all(), name


def test_the_sequence_is_causal(params):
    given = inputs() | {"text_mask": jnp.ones((2, 5), bool)}
    base = states(params, given)
    first = {"text_embedding": 5, "t": 6, "x": 7}  # the place from which on an input is seen
    for name, place in first.items():
        moved = np.abs(states(params, given | {name: given[name] + 1}) - base).max((0, 2))
        assert (moved[:place] == 0).all() and (moved[place:] > 1e-5).all(), name
    last_word = given["text_states"].at[:, 4].add(1.0)
    moved = np.abs(states(params, given | {"text_states": last_word}) - base).max((0, 2))
    assert (moved[:4] == 0).all() and (moved[4:] > 1e-5).all()


def test_an_example_does_not_know_its_batch(params):
    swapped = {name: value[::-1] for name, value in inputs().items()}
    np.testing.assert_allclose(run(params, swapped)[1], run(params)[0], atol=1e-5)


def test_bfloat16_computes_about_the_same(params):
    coarse = replace(CONFIG, transformer=replace(CONFIG.transformer, dtype="bfloat16"))
    exact, other = run(params), run(params, config=coarse)
    assert other.dtype == jnp.float32
    error = np.linalg.norm(np.asarray(other - exact)) / np.linalg.norm(np.asarray(exact))
    assert 1e-5 < error < 3e-2  # roundings of 2^-9 through a block


def test_whitening_is_undone_by_restoring():
    rng = np.random.default_rng(0)
    embedding = jnp.asarray(rng.normal(0.3, 0.05, (64, 8)), jnp.float32)
    whitening = Whitening(embedding.mean(0), embedding.std(0))
    white = whitening.whiten(embedding)
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(white.std(0), 1, atol=1e-4)
    np.testing.assert_allclose(whitening.restore(white), embedding, atol=1e-6)
