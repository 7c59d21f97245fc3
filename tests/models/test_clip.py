from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.config import ClipConfig, TransformerConfig
from unclip_jax.models.clip import Clip, ImageTower, TextTower, normalise, preprocess

CONFIG = ClipConfig(
    embedding_dim=8,
    image_size=16,
    patch_size=8,
    vision=TransformerConfig(width=16, layers=1, heads=2),
    text=TransformerConfig(width=24, layers=1, heads=2, causal=True),
    vocab_size=40,
    context_length=7,
)
IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8))
TOKENS = jnp.array([[38, 5, 9, 39, 0, 0, 0], [38, 5, 39, 0, 0, 0, 0], [38, 5, 9, 7, 1, 2, 39]])


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(Clip(CONFIG).init, jax.random.key(0), preprocess(CONFIG, IMAGES), TOKENS)
    rng = np.random.default_rng(0)
    start = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.25, x.shape), jnp.float32), shapes)
    return {"params": start["params"] | {"log_scale": jnp.float32(np.log(1 / CONFIG.temperature))}}


@partial(jax.jit, static_argnums=2)
def text(params, tokens, config: ClipConfig = CONFIG):
    return Clip(config).apply(params, tokens, method="encode_text")


@partial(jax.jit, static_argnums=2)
def image(params, pictures, config: ClipConfig = CONFIG):
    return Clip(config).apply(params, preprocess(config, pictures), method="encode_image")


def test_states_do_not_know_later_tokens(params):
    states = text(params, TOKENS).states
    assert states.shape == (3, 7, 24)
    np.testing.assert_allclose(states[0, :2], states[1, :2], atol=1e-6)
    np.testing.assert_allclose(states[0, :3], states[2, :3], atol=1e-6)
    assert np.abs(np.asarray(states[0, 2] - states[1, 2])).max() > 1e-3

    def state(embeddings, place: int):
        bound = jax.tree.map(lambda x: x, params["params"]) | {"token_embedding": {"embedding": embeddings}}
        return Clip(CONFIG).apply({"params": bound}, TOKENS[2:], method="encode_text").states[0, place].sum()

    table = params["params"]["token_embedding"]["embedding"]
    gradient = np.abs(np.asarray(jax.jit(jax.grad(state), static_argnums=1)(table, 3))).max(-1)
    assert (gradient[[38, 5, 9, 7]] > 0).all() and (gradient[[1, 2, 39]] == 0).all()


def test_the_end_of_text_is_pooled(params):
    """At the largest id by default, else at the first eos_id; what follows it does not matter."""
    encoding = text(params, TOKENS)
    kernel = params["params"]["text_projection"]["kernel"]
    for row, end in enumerate((3, 2, 6)):
        expected = encoding.states[row, end] @ kernel
        np.testing.assert_allclose(encoding.embedding[row], expected, rtol=1e-4, atol=1e-6)
    padded = TOKENS.at[1, 3:].set(11)
    np.testing.assert_allclose(text(params, padded).embedding[1], encoding.embedding[1], atol=1e-6)
    named = replace(CONFIG, eos_id=9)
    moved = text(params, TOKENS, named)
    np.testing.assert_allclose(moved.embedding[0], encoding.states[0, 2] @ kernel, rtol=1e-4, atol=1e-6)


def test_an_example_does_not_know_its_batch(params):
    np.testing.assert_allclose(image(params, IMAGES[jnp.array([0, 2, 2])])[0], image(params, IMAGES)[0], atol=1e-5)
    np.testing.assert_allclose(text(params, TOKENS[::-1]).embedding[2], text(params, TOKENS).embedding[0], atol=1e-5)


def test_a_tower_alone_needs_its_own_parameters_only(params):
    for tower, method, argument, expected in (
        (TextTower(CONFIG), "encode_text", TOKENS, text(params, TOKENS)),
        (ImageTower(CONFIG), "encode_image", preprocess(CONFIG, IMAGES), image(params, IMAGES)),
    ):
        own = jax.eval_shape(partial(tower.init, method=method), jax.random.key(0), argument)["params"]
        part = {"params": {name: params["params"][name] for name in own}}
        found = jax.jit(partial(tower.apply, method=method))(part, argument)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found, expected)


def test_every_patch_counts(params):
    base = image(params, IMAGES)
    for y in (0, 8):
        for x in (0, 8):
            changed = IMAGES.at[:, y : y + 8, x : x + 8].set(0)
            assert np.abs(np.asarray(image(params, changed) - base)).max() > 1e-3
    # Positions tell the same patches in another order apart.
    assert np.abs(np.asarray(image(params, jnp.roll(IMAGES, 8, 2)) - base)).max() > 1e-3


def test_preprocessing_and_normalising():
    white = preprocess(CONFIG, jnp.full((1, 2, 2, 3), 255, jnp.uint8))
    expected = (1 - np.array(CONFIG.image_mean)) / np.array(CONFIG.image_std)
    np.testing.assert_allclose(white[0, 0, 0], expected, rtol=1e-5)
    x = jax.random.normal(jax.random.key(0), (4, 8)) * 30
    np.testing.assert_allclose(np.linalg.norm(normalise(x), axis=-1), 1, rtol=1e-5)
    assert jnp.isfinite(normalise(jnp.zeros((1, 8)))).all()


def test_the_scale_starts_at_the_temperature_and_is_capped(params):
    module = Clip(CONFIG)
    np.testing.assert_allclose(module.apply(params, method="scale"), 1 / 0.07, rtol=1e-5)
    hot = {"params": {**params["params"], "log_scale": jnp.float32(9.0)}}
    assert module.apply(hot, method="scale") == CONFIG.max_logit_scale


def test_bfloat16_computes_about_the_same(params):
    coarse = replace(
        CONFIG, vision=replace(CONFIG.vision, dtype="bfloat16"), text=replace(CONFIG.text, dtype="bfloat16")
    )
    for exact, other in (
        (image(params, IMAGES), image(params, IMAGES, coarse)),
        (text(params, TOKENS).embedding, text(params, TOKENS, coarse).embedding),
    ):
        assert other.dtype == jnp.float32
        error = np.linalg.norm(np.asarray(other - exact)) / np.linalg.norm(np.asarray(exact))
        assert 1e-5 < error < 3e-2  # roundings of 2^-9 through norms and two towers
