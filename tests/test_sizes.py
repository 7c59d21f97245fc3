"""Every published size, built without memory and counted."""

import math
import runpy
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from unclip_jax.config import (
    ArPriorConfig,
    ClipConfig,
    DecoderConfig,
    NetworkConfig,
    OptimConfig,
    PriorConfig,
    UNetConfig,
    UpsamplerConfig,
)
from unclip_jax.models.ar_prior import ArPrior
from unclip_jax.models.clip import Clip
from unclip_jax.models.decoder import Decoder, init_decoder
from unclip_jax.models.prior import Prior
from unclip_jax.models.upsampler import Upsampler, init_upsampler
from unclip_jax.optim import optimizer
from unclip_jax.sharding import RULES, Strategy, abstract_mesh, shard_state
from unclip_jax.sharding.rules import path_name, rule_of
from unclip_jax.types import Params, TrainState

CONFIGS = Path(__file__).parents[1] / "configs"
MILLION = 1_000_000

# Model sizes as instantiated from Table 3 of arXiv 2204.06125 (which rounds them to 3.5B, 1B, 700M and 300M), its
# appendix C and, for GLIDE, section 4 of arXiv 2112.10741: config, part of the parameters, count.
PAPER = [
    ("dalle2_decoder", "", 3563 * MILLION),
    ("dalle2_decoder", "text_encoder", 1310 * MILLION),
    ("dalle2_prior", "", 1209 * MILLION),
    ("dalle2_ar_prior", "", 804 * MILLION),  # the latent decoder alone; a text encoder of 24 x 2048 counts apart
    ("dalle2_up256", "", 730 * MILLION),
    ("dalle2_up1024", "", 282 * MILLION),
    ("dalle2_clip", "", 986 * MILLION),
]
GLIDE_UPSAMPLER = 1500 * MILLION  # the paper's one rounded figure; it does not give the text encoder's depth

# Counts of the published files of kakaobrain/karlo-v1-alpha.
PRIOR_STATISTICS = 2 * 768  # clip_mean and clip_std lie in Karlo's file; here they are constants, not parameters
KARLO_PRIOR, KARLO_UNET, KARLO_PROJECTIONS, KARLO_UPSAMPLER = 1_022_030_080, 885_439_686, 7_878_400, 691_579_523
KARLO_TEXT, KARLO_IMAGE = 123_650_304, 303_966_208

_SHAPES: dict[NetworkConfig, Params] = {}


def network(name: str) -> NetworkConfig:
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]().network


def shapes(config: NetworkConfig) -> Params:
    """The tree of parameters of a network as shapes, each network traced once."""
    if config not in _SHAPES:
        _SHAPES[config] = jax.eval_shape(lambda key: _init(config, key), jax.random.key(0))
    return _SHAPES[config]


def _init(config: NetworkConfig, key: jax.Array) -> Params:
    match config:
        case DecoderConfig():
            return init_decoder(Decoder(config), key)
        case UpsamplerConfig():
            return init_upsampler(Upsampler(config), key)
        case ClipConfig():
            pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
            return Clip(config).init(key, pixels, jnp.zeros((1, config.context_length), jnp.int32))["params"]
        case PriorConfig():
            states = jnp.zeros((1, config.context_length, config.text_dim))
            z, t, mask = (
                jnp.zeros((1, config.embedding_dim)),
                jnp.zeros((1,), jnp.int32),
                jnp.ones(states.shape[:2], bool),
            )
            return Prior(config).init(key, z, t, states, mask, z)["params"]
        case ArPriorConfig():
            states, z = jnp.zeros((1, config.context_length, config.text_dim)), jnp.zeros((1, config.embedding_dim))
            tokens, dot_token = jnp.zeros((1, config.components), jnp.int32), jnp.zeros((1,), jnp.int32)
            return ArPrior(config).init(key, tokens, dot_token, states, jnp.ones(states.shape[:2], bool), z)["params"]


def count(tree: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "part", "expected"), PAPER)
def test_paper_sizes(name: str, part: str, expected: int) -> None:
    tree = shapes(network(name))
    assert count(tree[part] if part else tree) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem[:5] in ("dalle", "karlo"))
)
def test_an_eighth_of_the_train_state_lies_on_each_of_eight_devices(name: str) -> None:
    """And tensor splits every large leaf: no rule is missing."""
    params = shapes(network(name))

    def create(params: Params) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, params, optimizer(OptimConfig(), params).init(params), zero)

    state = jax.eval_shape(create, params)
    shardings = shard_state(state, abstract_mesh(Strategy(fsdp=8)))
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf, _ in pairs)
    each = sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in pairs)
    assert total / 8 <= each <= 1.05 * total / 8
    split = shard_state(params, abstract_mesh(Strategy(tensor=2)))
    whole = jax.tree.map(lambda leaf, place: leaf.size if place.is_fully_replicated else 0, params, split)
    assert max(jax.tree.leaves(whole)) < 2 * MILLION


def test_every_rule_is_used() -> None:
    names = ("dalle2_clip", "dalle2_decoder", "dalle2_prior", "karlo_decoder", "dalle2_ar_prior")
    leaves = [
        path_name(path) for name in names for path, _ in jax.tree_util.tree_leaves_with_path(shapes(network(name)))
    ]
    assert {rule_of(leaf) for leaf in leaves} - {None} == set(RULES)


def test_glide_upsampler() -> None:
    tree = shapes(network("glide_upsampler"))
    assert count(tree) == pytest.approx(GLIDE_UPSAMPLER, rel=0.05)
    assert {"down_3_attention_0", "up_5_attention_2", "middle_attention"} <= set(tree["unet"])


def test_karlo_decoder() -> None:
    tree = shapes(network("karlo_decoder"))
    assert count(tree["unet"]) == KARLO_UNET
    assert count(tree) - count(tree["unet"]) == KARLO_PROJECTIONS
    assert len(jax.tree.leaves(tree["unet"])) == 716
    assert len(jax.tree.leaves(tree)) - 716 == 11


@pytest.mark.parametrize("name", ["karlo_up256", "karlo_up256_last"])
def test_karlo_upsamplers(name: str) -> None:
    tree = shapes(network(name))
    assert count(tree) == KARLO_UPSAMPLER
    assert len(jax.tree.leaves(tree)) == 408


def test_karlo_prior() -> None:
    assert count(shapes(network("karlo_prior"))) + PRIOR_STATISTICS == KARLO_PRIOR


def test_karlo_clip() -> None:
    assert count(shapes(network("karlo_clip"))) == KARLO_TEXT + KARLO_IMAGE + 1  # and the temperature
    tree = shapes(network("karlo_clip"))
    text = {"token_embedding", "text_positions", "text_transformer", "text_norm", "text_projection"}
    assert count({name: leaf for name, leaf in tree.items() if name in text}) == KARLO_TEXT


def karlo_decoder_shapes() -> Counter:
    """Shapes of Karlo's decoder, written out from its layer plan in torch's order (out, in, height, width)."""
    widths, found = (320, 640, 960, 1280), []

    def norm(c: int) -> None:
        found.extend([(c,), (c,)])

    def linear(out: int, into: int) -> None:
        found.extend([(out, into), (out,)])

    def conv(out: int, into: int, side: int = 3) -> None:
        found.extend([(out, into, side, side), (out,)])

    def res(out: int, into: int) -> None:
        norm(into)
        conv(out, into)
        linear(2 * out, 1280)
        norm(out)
        conv(out, out)
        if into != out:
            conv(out, into, 1)

    def attention(c: int) -> None:
        norm(c)
        for into in (c, c, c, 1536, 1536, c):  # q, k, v, context k, context v, out
            linear(c, into)

    conv(320, 3)
    linear(1280, 320)
    linear(1280, 1280)
    norm(320)
    conv(6, 320)
    for level, width in enumerate(widths):
        for into in (widths[max(level - 1, 0)], width, width):
            res(width, into)
            if level > 0:
                attention(width)
        if level < 3:
            res(width, width)
    res(1280, 1280)
    attention(1280)
    res(1280, 1280)
    up_inputs = (
        (1280, (2560, 2560, 2560, 2240)),
        (960, (2240, 1920, 1920, 1600)),
        (640, (1600, 1280, 1280, 960)),
        (320, (960, 640, 640, 640)),
    )
    for width, inputs in up_inputs:
        for into in inputs:
            res(width, into)
            if width > 320:
                attention(width)
        if width > 320:
            res(width, width)
    return Counter(found)


def test_every_tensor_of_karlos_decoder() -> None:
    def torch_shape(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        match leaf.shape:
            case (height, width, into, out):
                return out, into, height, width
            case (into, out):
                return out, into
            case other:
                return other

    expected = karlo_decoder_shapes()
    assert expected.total() == 716
    assert Counter(map(torch_shape, jax.tree.leaves(shapes(network("karlo_decoder"))["unet"]))) == expected


def test_fractional_multipliers() -> None:
    config = UpsamplerConfig(unet=UNetConfig(in_channels=6, channels=64, multipliers=(1, 1.5), depth=1, groups=16))
    assert shapes(config)["unet"]["down_1_0"]["conv_0"]["kernel"].shape == (3, 3, 64, 96)
