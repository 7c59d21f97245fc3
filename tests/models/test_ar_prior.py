from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.config import ArPriorConfig, TrainConfig, TransformerConfig
from unclip_jax.inputs import Text, picture_keys
from unclip_jax.models.ar_prior import ArPrior, smooth
from unclip_jax.models.quantiser import Quantiser
from unclip_jax.priors import sample_ar_prior

CONFIG = ArPriorConfig(
    embedding_dim=8,
    text_dim=12,
    context_length=5,
    components=6,
    buckets=7,
    dot_buckets=4,
    transformer=TransformerConfig(width=16, layers=2, heads=2, causal=True),
)


def inputs() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {
        "tokens": jnp.asarray(rng.integers(0, 7, (2, 6)), jnp.int32),
        "dot_token": jnp.array([1, 3]),
        "text_states": jnp.asarray(rng.normal(size=(2, 5, 12)), jnp.float32),
        "text_mask": jnp.array([[True, True, True, False, False], [True, True, True, True, True]]),
        "text_embedding": jnp.asarray(rng.normal(size=(2, 8)), jnp.float32),
    }


@pytest.fixture(scope="module")
def params():
    start = jax.eval_shape(partial(ArPrior(CONFIG).init, **inputs()), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.25, x.shape), jnp.float32), start)


@partial(jax.jit, static_argnums=0)
def apply(config: ArPriorConfig, params, given: dict[str, Any]):
    return ArPrior(config).apply(params, **given)


def run(params, changes: dict[str, Any] | None = None, config: ArPriorConfig = CONFIG) -> np.ndarray:
    return np.asarray(apply(config, params, inputs() | (changes or {})))


@partial(jax.jit, static_argnums=0)
def cached(config: ArPriorConfig, params, given: dict[str, Any]):
    """The same logits, token after token."""
    call: Any = partial(ArPrior(config).apply, params)
    text = [given[name] for name in ("text_states", "text_mask", "text_embedding")]

    def step(memory, told):
        last, number = told
        logits, memory = call(last, number, given["text_mask"], memory, method="step")
        return memory, logits

    before = jnp.concatenate([given["dot_token"][:, None], given["tokens"][:, :-1]], axis=1)
    _, logits = jax.lax.scan(step, call(*text, method="begin"), (before.T, jnp.arange(config.components)))
    return logits.swapaxes(0, 1)


def test_decoding_with_a_memory_equals_decoding_without(params):
    whole = run(params)
    assert whole.shape == (2, 6, 7) and whole.dtype == np.float32 and whole.std() > 0.1
    np.testing.assert_allclose(cached(CONFIG, params, inputs()), whole, rtol=1e-5, atol=1e-5)


def test_a_token_is_told_of_those_before_it_alone(params):
    base, tokens = run(params), inputs()["tokens"]
    for place in range(6):
        moved = np.abs(run(params, {"tokens": tokens.at[:, place].set((tokens[:, place] + 1) % 7)}) - base).max((0, 2))
        assert (moved[: place + 1] == 0).all() and (moved[place + 1 :] > 1e-5).all()


def test_every_token_is_told_of_the_caption(params):
    base, given = run(params), inputs()
    for name in ("text_states", "text_embedding"):
        assert (np.abs(run(params, {name: -given[name]}) - base).max(-1) > 1e-3).all(), name
    assert (np.abs(run(params, {"dot_token": jnp.array([2, 0])}) - base).max(-1) > 1e-4).all()


def test_padding_has_no_influence(params):
    given = inputs()
    garbage = given | {"text_states": jnp.where(given["text_mask"][..., None], given["text_states"], 1e4)}
    np.testing.assert_array_equal(run(params, garbage), run(params))
    np.testing.assert_allclose(cached(CONFIG, params, garbage), run(params), rtol=1e-5, atol=1e-5)


def test_bfloat16_computes_about_the_same(params):
    coarse = replace(CONFIG, transformer=replace(CONFIG.transformer, dtype="bfloat16"))
    exact, other = run(params), run(params, config=coarse)
    assert other.dtype == np.float32
    error = np.linalg.norm(other - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 3e-2  # roundings of 2^-9 through two blocks


def test_neighbouring_tokens_start_alike():
    table = np.asarray(smooth(jax.random.key(0), (256, 64)), np.float64)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    likeness = unit @ unit.T
    assert np.diagonal(likeness, 1).min() > 0.9 > np.diagonal(likeness, 64).max()


def quantiser() -> Quantiser:
    rng = np.random.default_rng(4)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)
    edges = np.linspace(-0.5, 0.5, 3, dtype=np.float32)
    high = np.ones(6, np.float32)
    return Quantiser(0.1 * basis[:, 7], basis[:, :6], -high, high, np.asarray(7, np.int32), edges)  # type: ignore


def draw(params, keys, rows: slice = slice(None), guidance: float = 2.0, temperature: float = 1.0) -> np.ndarray:
    given, count = inputs(), len(keys)
    names = ("text_states", "text_mask", "text_embedding")
    text = Text(*(given[name][jnp.arange(count) % 2][rows] for name in names))
    null = Text(jnp.ones((1, 5, 12)), jnp.arange(5)[None] < 2, jnp.ones((1, 8)))
    settings = (jnp.full((len(text.mask),), value, jnp.float32) for value in (guidance, temperature))
    config = TrainConfig("tiny", CONFIG)
    return np.asarray(sample_ar_prior(config, params["params"], quantiser(), keys[rows], text, null, *settings))


def tokens_of(embedding: np.ndarray) -> np.ndarray:
    """The tokens that were drawn, from unit-length embeddings: z = s (mean + A c), and the mean lies outside of A."""
    tables = quantiser()
    scale = embedding @ np.asarray(tables.mean) / 0.01
    coefficients = embedding / scale[:, None] @ np.asarray(tables.components)
    tokens = (coefficients + 1) * 7 / 2 - 0.5
    np.testing.assert_allclose(tokens, tokens.round(), atol=1e-2)
    return tokens.round().astype(int)


def test_a_draw_is_the_same_alone_and_in_a_batch(params):
    keys = picture_keys(7, 4)
    four = draw(params, keys)
    assert four.shape == (4, 8)
    np.testing.assert_allclose(np.linalg.norm(four, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(draw(params, keys, slice(2, 3))[0], four[2], atol=1e-5)
    assert np.abs(four[0] - four[2]).max() > 0.1  # the same caption, another key


def test_settings_are_data(params):
    keys = picture_keys(0, 4)
    plain = draw(params, keys)
    programs = sample_ar_prior._cache_size()
    assert not np.allclose(draw(params, keys, guidance=6.0), plain)
    assert not np.allclose(draw(params, keys, temperature=0.3), plain)
    assert sample_ar_prior._cache_size() == programs


def with_dot_rows(params, change):
    """The parameters with other embeddings of the dot tokens."""
    table = params["params"]["token_embedding"]["embedding"]
    return {"params": {**params["params"], "token_embedding": {"embedding": table.at[7:].set(change(table[7:]))}}}


def test_cold_draws_take_the_likeliest_token_each_time(params):
    """Where the dot token, the one thing still drawn, has no influence."""
    still = with_dot_rows(params, lambda rows: jnp.broadcast_to(rows[:1], rows.shape))
    tokens = tokens_of(draw(still, picture_keys(0, 4), guidance=1.0, temperature=0.0))
    np.testing.assert_array_equal(tokens[2:], tokens[:2])
    guess = run(still, {"tokens": jnp.asarray(tokens[:2])}).argmax(-1)
    np.testing.assert_array_equal(guess, tokens[:2])


def test_warm_draws_follow_the_logits(params):
    """First tokens of many pictures of one caption, against the mixture over the upper dot tokens and not the lower."""
    count = 1024
    loud = with_dot_rows(params, lambda rows: rows * jnp.array([[8.0], [8.0], [-8.0], [-8.0]]))["params"]
    loud = {"params": loud | {"norm": jax.tree.map(lambda x: 4 * x, loud["norm"])}}  # and chances far from even
    first = tokens_of(draw(loud, jax.random.split(jax.random.key(11), 2 * count), guidance=1.0))[::2, 0]
    found = np.bincount(first, minlength=7) / count
    logits = np.stack([run(loud, {"dot_token": jnp.full((2,), token)})[0, 0] for token in range(4)])
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    lower, upper = (np.abs(found - half.mean(0)).max() for half in (chances[:2], chances[2:]))
    assert upper < 4.5 * np.sqrt(0.25 / count) < lower
