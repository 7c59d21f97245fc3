from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.config import (
    ArPriorConfig,
    ClipConfig,
    DecoderConfig,
    DiffusionConfig,
    OptimConfig,
    PriorConfig,
    TrainConfig,
    TransformerConfig,
    UNetConfig,
    UpsamplerConfig,
)
from unclip_jax.models.quantiser import fit
from unclip_jax.sharding import make_mesh
from unclip_jax.stages import build, encode_image, to_model, to_pixels
from unclip_jax.train import init_state, train_step
from unclip_jax.types import Batch, Stage

TOWER = TransformerConfig(width=16, layers=1, heads=2)
CAUSAL = replace(TOWER, causal=True)
CLIP = ClipConfig(8, 16, 8, TOWER, CAUSAL, vocab_size=20, context_length=5)
UNET = UNetConfig(channels=8, multipliers=(1,), depth=1, groups=4, head_channels=8, patch=4)
OPTIM = OptimConfig(learning_rate=3e-3, warmup=1)
STEPS = 40

CONFIGS = {
    "clip": TrainConfig("clip", CLIP, optim=OPTIM),
    "prior": TrainConfig("prior", PriorConfig(8, 16, 5, CAUSAL), DiffusionConfig(prediction="x0"), optim=OPTIM),
    "ar_prior": TrainConfig("ar_prior", ArPriorConfig(8, 16, 5, 8, 16, 4, CAUSAL), optim=OPTIM),
    "decoder": TrainConfig(
        "decoder",
        DecoderConfig(
            replace(UNET, attention_factors=(1,), context_dim=16),
            size=16,
            image_embedding_dim=8,
            text_dim=16,
            learned_null_text=True,
            context_length=5,
        ),
        DiffusionConfig(prediction="x0"),
        optim=replace(OPTIM, learning_rate=1e-2),
    ),
    "upsampler": TrainConfig(
        "upsampler",
        UpsamplerConfig(replace(UNET, in_channels=6), low_size=4, size=16),
        DiffusionConfig(schedule="linear", prediction="v"),
        optim=replace(OPTIM, learning_rate=1e-2),
    ),
}


def make_batch() -> Batch:
    """Eight flat pictures of different colours with a bright quarter, each with its own caption."""
    rng = np.random.default_rng(0)
    image = np.tile(rng.integers(0, 200, (8, 1, 1, 3), np.uint8), (1, 16, 16, 1))
    image[:, :8, :8] = 255
    tokens = np.zeros((8, 5), np.int32)
    tokens[:, 0], tokens[:, 2], tokens[:, 1] = 18, 19, np.arange(1, 9)
    return Batch(jnp.asarray(image), jnp.asarray(tokens), jnp.asarray(tokens > 0), jnp.asarray(image[:, ::4, ::4]))


BATCH = make_batch()


@pytest.fixture(scope="module")
def context() -> dict[str, Any]:
    """Frozen trees: a random CLIP, its statistics on the batch, and the empty caption."""
    clip = jax.jit(build(CONFIGS["clip"]).init)(jax.random.key(5))
    embedding = encode_image(CLIP, clip, BATCH.image)
    whitening = {"mean": embedding.mean(0), "std": jnp.full(8, embedding.std(0).mean())}
    empty = jnp.array([[18, 19, 0, 0, 0]], jnp.int32)
    random = np.random.default_rng(2).normal(size=(64, 8)).astype(np.float32)
    tables = fit(random / np.linalg.norm(random, axis=1, keepdims=True), random[::-1], 8, 16, 4)._asdict()
    return {
        "clip": clip,
        "whitening": whitening,
        "quantiser": jax.tree.map(jnp.asarray, tables),
        "empty": {"tokens": empty, "mask": empty > 0},
    }


def some_params(stage: Stage) -> Any:
    """Parameters of which none is zero, without compiling an initialiser."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.02, 0.1, x.shape), jnp.float32), shapes)


def stage_of(name: str, **changes: Any) -> Stage:
    return build(replace(CONFIGS[name], **changes), CLIP)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_of_every_stage_falls_on_one_batch(name, context):
    """Forty updates on eight pictures; means over ten updates, since every one draws its own noise."""
    config, stage = CONFIGS[name], stage_of(name)
    state = init_state(config, stage, make_mesh(devices=jax.devices()[:1]))

    step = jax.jit(partial(train_step, config, stage))
    frozen, losses, scales = jax.tree.map(np.array, context), [], []
    for _ in range(STEPS):
        state, metrics = step(state, context, BATCH, jax.random.key(1))
        losses.append(float(metrics["loss"]))
        scales.append(metrics.get("scale"))
    before, after = np.mean(losses[:10]), np.mean(losses[-10:])
    assert int(state.skipped) == 0 and int(state.step) == STEPS
    assert after < 0.8 * before, (before, after)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert jax.tree.all(jax.tree.map(np.array_equal, frozen, context))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    if name == "clip":
        np.testing.assert_allclose(scales[0], 1 / 0.07, rtol=1e-5)


@pytest.fixture(scope="module")
def clip_loss(context):
    return jax.jit(lambda batch: build(CONFIGS["clip"]).loss(context["clip"], {}, batch, jax.random.key(0)))


def test_the_clip_loss_is_symmetric_cross_entropy(context, clip_loss):
    """Without the pairs off the diagonal whose captions are equal."""
    from unclip_jax.models.clip import Clip, preprocess

    tokens = BATCH.tokens.at[3].set(BATCH.tokens[1]).at[6].set(BATCH.tokens[1])
    apply = jax.jit(Clip(CLIP).apply)
    image, text, scale = apply({"params": context["clip"]}, preprocess(CLIP, BATCH.image), tokens)
    image, text = (np.asarray(x, np.float64) for x in (image, text.embedding))
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    total = 0.0
    for i in range(8):
        others = [j for j in range(8) if j == i or not np.array_equal(tokens[i], tokens[j])]
        for row in (image[i] @ text[others].T, image[others] @ text[i]):
            row = float(scale) * row
            total += np.log(np.exp(row).sum()) - row[others.index(i)]
    loss, _ = clip_loss(BATCH._replace(tokens=tokens))
    np.testing.assert_allclose(loss, total / 16, rtol=1e-5)
    assert loss < clip_loss(BATCH)[0] + 1e3  # the plain batch runs through the same program


def test_equal_captions_are_no_negatives_of_each_other(clip_loss):
    everywhere = jnp.broadcast_to(BATCH.tokens[:1], BATCH.tokens.shape)
    loss, metrics = clip_loss(BATCH._replace(tokens=everywhere))
    assert loss == 0 and metrics["top1"] == 1
    assert clip_loss(BATCH)[0] > 0.1


def test_clip_does_not_care_in_what_order_pairs_come(clip_loss):
    order = np.array([5, 2, 7, 0, 1, 6, 4, 3])
    shuffled = BATCH._replace(image=BATCH.image[order], tokens=BATCH.tokens[order])
    np.testing.assert_allclose(clip_loss(shuffled)[0], clip_loss(BATCH)[0], rtol=1e-5)


def test_a_dropped_caption_may_be_the_empty_one(context):
    network = replace(CONFIGS["decoder"].network, empty_null_text=True, learned_null_text=False, image_drop=0.0)

    def loss(drop: float, batch: Batch) -> float:
        stage = stage_of("decoder", network=replace(network, text_drop=drop))
        return stage.loss(some_params(stage), context, batch, jax.random.key(2))[0]

    empty = {name: jnp.broadcast_to(row, BATCH.tokens.shape) for name, row in context["empty"].items()}
    np.testing.assert_allclose(loss(1.0, BATCH), loss(0.0, BATCH._replace(**empty)), rtol=1e-6)
    assert abs(loss(1.0, BATCH) - loss(0.0, BATCH)) > 1e-4


@pytest.mark.parametrize("name", ["prior", "ar_prior", "decoder"])
def test_a_stored_embedding_equals_one_computed_in_the_step(name, context):
    stage = stage_of(name)
    params = some_params(stage)
    stored = BATCH._replace(embedding=encode_image(CLIP, context["clip"], BATCH.image))
    loss = jax.jit(lambda batch: stage.loss(params, context, batch, jax.random.key(2))[0])
    np.testing.assert_allclose(loss(BATCH), loss(stored), rtol=1e-5)


@pytest.mark.parametrize("name", ["decoder", "upsampler"])
def test_previews_are_pictures_that_do_not_depend_on_the_batch(name, context):
    stage = stage_of(name)
    assert stage.preview is not None
    params = some_params(stage)
    preview = jax.jit(stage.preview)
    keys = jax.random.split(jax.random.key(0), 8)
    pictures = preview(params, context, BATCH, keys)
    wide = 32 if name == "upsampler" else 16  # upsamplers show what they were given on the left
    assert pictures.shape == (8, 16, wide, 3) and pictures.dtype == jnp.uint8
    swapped = preview(params, context, jax.tree.map(lambda x: x[::-1], BATCH), keys[::-1])
    assert np.abs(np.asarray(swapped[::-1], int) - np.asarray(pictures, int)).max() <= 1
    assert np.asarray(pictures[:, :, wide - 16 :]).std() > 5


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_means_float32_in_every_matrix_product(name, context, operations):
    stage = stage_of(name)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    step = jax.value_and_grad(stage.loss, has_aux=True)
    program = jax.make_jaxpr(step)(params, context, BATCH, jax.random.key(0))
    products = [e for e in operations(program.jaxpr) if e.primitive.name in ("dot_general", "conv_general_dilated")]
    assert len(products) > 10
    for product in products:
        precision = product.params["precision"]
        pair = precision if isinstance(precision, tuple) else (precision, precision)
        assert all(p == jax.lax.Precision.HIGHEST for p in pair), product


def test_the_loss_in_bfloat16_is_about_the_same(context):
    exact = stage_of("prior")
    network = CONFIGS["prior"].network
    assert isinstance(network, PriorConfig)
    coarse = stage_of("prior", network=replace(network, transformer=replace(CAUSAL, dtype="bfloat16")))
    params = some_params(exact)
    a, b = (jax.jit(s.loss)(params, context, BATCH, jax.random.key(1))[0] for s in (exact, coarse))
    assert a != b and b.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-2)


def test_a_dropped_caption_tells_the_ar_prior_only_its_dot_product(context):
    """With one bucket for all dot products, the loss of dropped captions is the same whatever they said."""
    embedded = BATCH._replace(embedding=encode_image(CLIP, context["clip"], BATCH.image))
    blind = context | {"quantiser": context["quantiser"] | {"dot_edges": jnp.full(3, 2.0)}}
    params, moved = jax.tree.map(lambda x: 5 * x, some_params(stage_of("ar_prior"))), []
    for drop in (0.0, 1.0):
        stage = stage_of("ar_prior", network=replace(CONFIGS["ar_prior"].network, text_drop=drop))
        loss = jax.jit(lambda batch, stage=stage: stage.loss(params, blind, batch, jax.random.key(1))[0])
        moved.append(abs(float(loss(embedded) - loss(embedded._replace(tokens=BATCH.tokens[::-1])))))
    assert moved[0] > 1e-5 and moved[1] == 0


def test_bytes_survive_the_models_range():
    every = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    assert np.array_equal(to_pixels(to_model(every)), every)
    ends = np.array([to_model(every).min(), to_model(every).max()])
    np.testing.assert_allclose(ends, [-1, 1], rtol=2e-7)  # division is not exact on every device


def test_what_cannot_be_built_is_refused(context):
    with pytest.raises(ValueError, match="trains on a frozen CLIP: name its file with --clip"):
        build(CONFIGS["prior"])
    with pytest.raises(ValueError, match="causal: set --network.transformer.causal true"):
        stage_of("ar_prior", network=replace(CONFIGS["ar_prior"].network, transformer=TOWER))
    with pytest.raises(ValueError, match="residual upsampler predicts x0 alone"):
        stage_of("upsampler", network=replace(CONFIGS["upsampler"].network, residual=True))
    stage = stage_of("upsampler")
    with pytest.raises(ValueError, match="set data.low_size"):
        jax.eval_shape(lambda key: stage.loss(stage.init(key), {}, BATCH._replace(low=None), key), jax.random.key(0))
