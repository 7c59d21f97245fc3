"""Properties of the U-Net, its blocks and what the decoder and upsampler feed it."""

from collections import Counter
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.config import DecoderConfig, TransformerConfig, UNetConfig, UpsamplerConfig
from unclip_jax.models import unet_blocks
from unclip_jax.models.decoder import Condition, Decoder, init_decoder
from unclip_jax.models.unet import UNet
from unclip_jax.models.unet_blocks import (
    AttentionBlock,
    GroupNorm,
    ResBlock,
    fold,
    timestep_embedding,
    unfold,
    visible_keys,
)
from unclip_jax.models.upsampler import Upsampler, init_upsampler, resize_low

CONFIG = UNetConfig(
    out_channels=6,
    channels=16,
    multipliers=(1, 2),
    depth=1,
    attention_factors=(2,),
    head_channels=8,
    context_dim=12,
    middle_attention=True,
    groups=4,
)
DECODER = DecoderConfig(unet=CONFIG, size=8, image_embedding_dim=10, text_dim=14, context_length=5)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(init) -> dict:
    """Parameters of the structure that init(key) gives, none zero; drawn by numpy, since compiling init is slow."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)


def begun(init, name: str) -> dict:
    """Parameters filled like these, but for one layer's, which are those that init gives."""
    return filled(init) | {name: jax.jit(lambda key: init(key)[name])(jax.random.key(0))}


@pytest.fixture(scope="module")
def decoder():
    """Jitted `call` and `condition` of one tiny decoder, and parameters without zeros."""
    module = Decoder(DECODER)
    call = jax.jit(lambda params, *args: module.apply({"params": params}, *args))
    condition = jax.jit(lambda params, *args: module.apply({"params": params}, *args, method="condition"))
    return call, condition, filled(lambda key: init_decoder(module, key))


@pytest.fixture(scope="module")
def inputs():
    """x, t and a condition of two examples with four image tokens and five text tokens."""
    mask = jnp.asarray([[True] * 9, [True] * 6 + [False] * 3])
    return normal(0, 2, 8, 8, 3), jnp.asarray([3, 700]), Condition(normal(1, 2, 64), normal(2, 2, 9, 12), mask)


def test_starts_at_zero(decoder, inputs):
    call, _, params = decoder
    out = call(params, *inputs)
    assert out.shape == (2, 8, 8, 6) and out.dtype == jnp.float32 and np.std(out) > 0.1

    @jax.jit
    def initial(key):
        leaves = jax.tree.leaves_with_path(init_decoder(Decoder(DECODER), key)["unet"])
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if path[-2].key in ("out", "conv_1")}

    zeros = initial(jax.random.key(0))
    assert len(zeros) == 2 * (1 + 10 + 4)  # kernel and bias: output, residual blocks, attention
    assert not any(np.any(leaf) for leaf in zeros.values())
    first = {name: zeros[f"['out']['{name}']"] for name in ("kernel", "bias")}
    assert not np.any(call(params | {"unet": params["unet"] | {"out": first}}, *inputs))


def test_hidden_tokens_have_no_influence(decoder, inputs):
    call, _, params = decoder
    x, t, condition = inputs
    hidden = condition._replace(context=jnp.where(condition.mask[..., None], condition.context, 1e3))
    np.testing.assert_array_equal(call(params, x, t, condition), call(params, x, t, hidden))
    seen = condition._replace(context=condition.context.at[:, 5].add(1.0))
    changed = np.abs(call(params, x, t, condition) - call(params, x, t, seen)).max((1, 2, 3))
    assert np.all(changed > 1e-4)


def test_every_input_has_influence(decoder, inputs):
    call, _, params = decoder
    x, t, condition = inputs
    before = call(params, x, t, condition)
    for changed in (
        call(params, x, t + 100, condition),
        call(params, x, t, condition._replace(embedding=condition.embedding + 1.0)),
        call(params, x, t, condition._replace(mask=jnp.ones_like(condition.mask)))[1:],
    ):
        assert np.abs(changed - before[-len(changed) :]).max() > 1e-4


def test_examples_do_not_mix(decoder, inputs):
    call, _, params = decoder
    x, t, condition = inputs
    flipped = call(params, x[::-1], t[::-1], jax.tree.map(lambda v: v[::-1], condition))
    np.testing.assert_allclose(flipped[::-1], call(params, x, t, condition), atol=1e-5)


@pytest.mark.parametrize("modulated", [False, True])
def test_group_norm_equals_flax(modulated):
    rng = np.random.default_rng(0)
    x, (weight, bias) = rng.normal(2, 3, (2, 6, 5, 12)).astype(np.float32), rng.normal(size=(2, 12)).astype(np.float32)
    params = {"params": {"scale": weight, "bias": bias}}
    expected = jax.jit(nn.GroupNorm(num_groups=4, epsilon=1e-5).apply)(params, x)
    args = ()
    if modulated:
        scale, shift = args = tuple(rng.normal(size=(2, 2, 12)).astype(np.float32))
        expected = expected * (1 + scale[:, None, None]) + shift[:, None, None]
    actual = jax.jit(GroupNorm(groups=4, epsilon=1e-5, dtype="float32").apply)(params, x, *args)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(("resample", "side"), [(None, 8), ("up", 16), ("down", 4)])
@pytest.mark.parametrize("scale_shift", [True, False])
def test_residual_block_shapes_and_identity(resample, side, scale_shift):
    block = ResBlock(8, groups=4, epsilon=1e-5, dtype="float32", scale_shift=scale_shift, resample=resample)
    x, embedding = normal(0, 1, 8, 8, 8), normal(1, 1, 6)
    params = begun(lambda key: block.init(key, x, embedding)["params"], "conv_1")
    assert params["embedding"]["kernel"].shape == (6, 16 if scale_shift else 8)
    out = jax.jit(block.apply)({"params": params}, x, embedding)
    expected = np.asarray(x)
    if resample == "up":
        expected = expected.repeat(2, 1).repeat(2, 2)
    if resample == "down":
        expected = expected.reshape(1, 4, 2, 4, 2, 8).mean((2, 4))
    assert expected.shape == (1, side, side, 8)
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("told", ["nothing", "some"])
def test_attention_in_one_kernel_sees_the_same_keys(told, monkeypatch):
    """What GPUs run, with the stand-in where cuDNN is absent; hidden tokens may lie anywhere in the context."""
    block = AttentionBlock(groups=2, epsilon=1e-5, dtype="float32", head_channels=4)
    mask = jnp.array([[True, False, True, False, True], [False, False, False, True, True]])
    given = (normal(2, 2, 5, 6), visible_keys(mask, 16)) if told == "some" else ()
    inputs = (normal(1, 2, 4, 4, 8), *given)
    params = filled(lambda key: block.init(key, *inputs))

    def run():
        return jax.jit(jax.value_and_grad(lambda params: jnp.square(block.apply(params, *inputs)).sum()))(params)

    expected = run()
    monkeypatch.setattr(unet_blocks, "flash", lambda query: True)
    with jax.default_matmul_precision("highest"):  # the kernel is for bfloat16, and so is the stand-in's default
        got = run()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


def test_fold_keeps_every_pixel():
    x = normal(0, 2, 8, 4, 3)
    assert fold(x, 2).shape == (2, 4, 2, 12)
    np.testing.assert_array_equal(unfold(fold(x, 2), 2), x)
    np.testing.assert_array_equal(np.asarray(fold(x, 2))[0, 1, 0, :3], np.asarray(x)[0, 2, 0])


def test_timestep_embedding():
    out = timestep_embedding(jnp.asarray([0, 250]), 6)
    angles = 250 * 10000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(out[0], [1, 1, 1, 0, 0, 0])
    np.testing.assert_allclose(out[1], np.concatenate([np.cos(angles), np.sin(angles)]), atol=1e-4)


def test_bfloat16_gradients_are_finite():
    config = replace(CONFIG, multipliers=(1,), attention_factors=(), dtype="bfloat16", patch=2, position_grid=4)
    unet = UNet(replace(config, dropout=0.1))
    args = normal(0, 1, 8, 8, 3), jnp.asarray([999]), normal(1, 1, 64), normal(2, 1, 4, 12)

    def loss(params):
        out = unet.apply({"params": params}, *args, deterministic=False, rngs={"dropout": jax.random.key(1)})
        assert out.shape == (1, 8, 8, 6) and out.dtype == jnp.float32
        return jnp.mean(jnp.square(out - 1.0))

    grads = jax.jit(jax.grad(loss))(filled(lambda key: unet.init(key, *args)["params"]))
    for path, grad in jax.tree.leaves_with_path(grads):
        assert grad.dtype == jnp.float32 and np.all(np.isfinite(grad)), jax.tree_util.keystr(path)
    assert all(np.any(grads[name]["kernel"]) for name in ("stem", "time_0", "out")) and np.any(grads["positions"])


def test_what_all_blocks_share_is_made_once(operations):
    """Masks of keys and dropout's keys; the TPU compiler takes minutes more where every block makes its own."""
    unet = UNet(replace(CONFIG, dropout=0.1, remat="block", attention_factors=(1, 2)))
    x, t, context = jnp.zeros((2, 8, 8, 3)), jnp.zeros((2,), jnp.int32), jnp.zeros((2, 5, 12))
    rest = None, context, jnp.ones((2, 5), bool)

    def loss(params):
        out = unet.apply(params, x, t, *rest, deterministic=False, rngs={"dropout": jax.random.key(0)})
        return out.sum()

    params = jax.eval_shape(lambda key: unet.init(key, x, t, *rest), jax.random.key(0))
    program = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    found = Counter((e.primitive.name, e.outvars[0].aval.shape) for e in operations(program) if e.outvars)
    splits = sum(times for (name, _), times in found.items() if name == "random_split")
    assert splits == 1 and found["pad", (2, 5 + 8 * 8)] == 1 and found["pad", (2, 5 + 4 * 4)] == 1


def test_positions_at_both_ends():
    unet = UNet(replace(CONFIG, patch=2, position_grid=8, context_dim=None))
    shapes = jax.eval_shape(unet.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1,), jnp.int32))
    assert shapes["params"]["positions"].shape == (1, 8, 8, 16)
    assert shapes["params"]["low_positions"].shape == (1, 4, 4, 16)
    assert shapes["params"]["stem"]["kernel"].shape == (3, 3, 12, 16)
    assert shapes["params"]["out"]["kernel"].shape == (3, 3, 16, 24)


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        ({"position_grid": 4, "patch": 2}, (1, 16, 16, 3), "8 x 8 pixels, it is 16 x 16"),
        ({}, (1, 9, 9, 3), "9 x 9 must be multiples of 2"),
        ({}, (1, 8, 8, 4), "takes 3 channels, the input has 4"),
        ({"multipliers": (1, 1.1)}, (1, 8, 8, 3), r"\(16, 17\) must be a multiple of groups=4"),
        ({"head_channels": 12}, (1, 8, 8, 3), r"\[32\] must be a multiple of config.head_channels=12"),
        ({}, (1, 8, 8, 3), "context_dim=12, but context is missing"),
    ],
)
def test_errors_name_sizes(change, shape, message):
    unet = UNet(replace(CONFIG, **change))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(unet.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros((shape[0],), jnp.int32))


def texts(batch: int = 4):
    """z_i, text states, mask, z_t."""
    mask = jnp.arange(5) < jnp.asarray([5, 3, 5, 2])[:batch, None]
    return normal(3, batch, 10), normal(4, batch, 5, 14), mask, normal(5, batch, 10)


KEEP_IMAGE, KEEP_TEXT = jnp.asarray([True, False, True, False]), jnp.asarray([True, True, False, False])


def test_condition_drops_image_and_text(decoder):
    _, condition, params = decoder
    image, states, mask, z_t = texts()
    out = condition(params, image, states, mask, z_t, KEEP_IMAGE, KEEP_TEXT)
    assert out.embedding.shape == (4, 64) and out.context.shape == (4, 9, 12)
    assert np.all(out.mask[:, :4])
    np.testing.assert_array_equal(out.mask[:, 4:], mask & KEEP_TEXT[:, None])

    null = params["null_image"]
    given = jnp.where(KEEP_IMAGE[:, None], image, null)
    # In numpy, which unlike matrix units rounds nothing.
    given, z_t, params = jax.tree.map(np.asarray, (given, z_t, params))
    dense = {name: (p["kernel"], p["bias"]) for name, p in params.items() if name.startswith(("image_", "text_to"))}
    embedding = given @ dense["image_to_time"][0] + dense["image_to_time"][1]
    embedding += KEEP_TEXT[:, None] * (z_t @ dense["text_to_time"][0] + dense["text_to_time"][1])
    np.testing.assert_allclose(out.embedding, embedding, atol=1e-4)
    tokens = given @ dense["image_to_tokens"][0] + dense["image_to_tokens"][1]
    np.testing.assert_allclose(out.context[:, :4], tokens.reshape(4, 12, 4).swapaxes(1, 2), atol=1e-4)


def test_dropped_conditions_leave_no_trace(decoder, inputs):
    call, condition, params = decoder
    x, t, _ = inputs
    none = jnp.zeros((2,), bool)
    image, states, mask, z_t = texts(2)
    first = condition(params, image, states, mask, z_t, none, none)
    second = condition(params, 2 * image, 3 - states, mask, -z_t, none, none)
    np.testing.assert_array_equal(call(params, x, t, first), call(params, x, t, second))


def test_learned_null_text():
    module = Decoder(replace(DECODER, learned_null_text=True))
    params = filled(lambda key: init_decoder(module, key))

    @jax.jit
    def condition(*args):
        return module.apply({"params": params}, *args, method="condition")

    image, states, mask, z_t = texts()
    out = condition(image, states, mask, z_t, KEEP_IMAGE, KEEP_TEXT)
    np.testing.assert_array_equal(out.mask[:, 4:], mask | ~KEEP_TEXT[:, None])
    np.testing.assert_array_equal(out.context[2:, 4:], jnp.broadcast_to(params["null_text"], (2, 5, 12)))
    image_only = condition(image, states, mask, 0 * z_t, KEEP_IMAGE, ~KEEP_TEXT)
    np.testing.assert_allclose(
        out.embedding[2] - params["null_text_to_time"],
        image_only.embedding[2] - params["text_to_time"]["bias"],
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="null text has 5 tokens, the captions have 3"):
        condition(image, states[:, :3], mask[:, :3], z_t, KEEP_IMAGE, KEEP_TEXT)


def test_own_text_encoder_hides_padding():
    module = Decoder(replace(DECODER, text_encoder=TransformerConfig(14, 1, 2), vocab_size=20))
    params = filled(lambda key: init_decoder(module, key))

    @jax.jit
    def encode(tokens, mask):
        return module.apply({"params": params}, tokens, mask, method="encode_text")

    mask = jnp.arange(5)[None] < 3
    states, embedding = encode(jnp.asarray([[4, 5, 6, 0, 0]]), mask)
    again, embedding_again = encode(jnp.asarray([[4, 5, 6, 9, 8]]), mask)
    np.testing.assert_array_equal(states[:, :3], again[:, :3])
    np.testing.assert_array_equal(embedding, embedding_again)
    np.testing.assert_allclose(embedding, states[:, 2], atol=1e-6)  # the compiler may normalise the one row anew


def test_upsampler_reads_the_low_picture_at_any_size():
    unet = UNetConfig(in_channels=6, channels=8, multipliers=(1,), depth=1, scale_shift=False, groups=4)
    module = Upsampler(UpsamplerConfig(unet=unet))
    params = filled(lambda key: init_upsampler(module, key))
    apply = jax.jit(lambda *args: module.apply({"params": params}, *args))
    for side in (4, 8):
        x, low, t = normal(0, 1, side, side, 3), normal(1, 1, side, side, 3), jnp.asarray([5])
        assert apply(x, t, low).shape == x.shape
        assert np.abs(apply(x, t, low) - apply(x, t, -low)).max() > 1e-3


def test_an_untrained_residual_upsampler_says_the_low_picture():
    unet = UNetConfig(in_channels=6, channels=8, multipliers=(1,), depth=1, scale_shift=False, groups=4)
    module = Upsampler(UpsamplerConfig(unet=unet, residual=True))
    params = {"unet": begun(lambda key: init_upsampler(module, key)["unet"], "out")}
    x, low = normal(0, 1, 4, 4, 3), normal(1, 1, 4, 4, 3)
    np.testing.assert_array_equal(jax.jit(module.apply)({"params": params}, x, jnp.asarray([5]), low), low)


def test_another_unet_takes_the_last_step():
    unet = UNetConfig(in_channels=6, channels=8, multipliers=(1,), depth=1, scale_shift=False, groups=4)
    one, two = Upsampler(UpsamplerConfig(unet=unet)), Upsampler(UpsamplerConfig(unet=unet, last_step=True))
    params = filled(lambda key: init_upsampler(two, key))
    assert set(params) == {"unet", "unet_last"}
    apply, apply_one = jax.jit(lambda t, x, low: two.apply({"params": params}, x, t, low)), jax.jit(one.apply)
    x, low = normal(0, 1, 4, 4, 3), normal(1, 1, 4, 4, 3)
    for t, name in ((5, "unet"), (0, "unet_last")):
        alone = apply_one({"params": {"unet": params[name]}}, x, jnp.asarray([t]), low)
        np.testing.assert_allclose(apply(jnp.asarray([t]), x, low), alone, atol=1e-5)
    assert np.abs(apply(jnp.asarray([0]), x, low) - apply(jnp.asarray([5]), x, low)).max() > 1e-3


def test_resize_low_keeps_constants_and_means():
    low = normal(0, 2, 4, 4, 3)
    assert resize_low(low, 16).shape == (2, 16, 16, 3)
    np.testing.assert_allclose(resize_low(jnp.full((1, 4, 4, 3), 0.3), 16), 0.3, atol=1e-6)
