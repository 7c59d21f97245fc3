import json
from copy import deepcopy
from typing import Any

import pytest

from unclip_jax.checkpoint import CheckpointError, from_json, to_json
from unclip_jax.config import (
    ArPriorConfig,
    ClipConfig,
    DecoderConfig,
    NetworkConfig,
    PriorConfig,
    TrainConfig,
    TransformerConfig,
    UNetConfig,
    UpsamplerConfig,
)


@pytest.mark.parametrize(
    "network",
    [
        ClipConfig(eos_id=2),
        PriorConfig(),
        ArPriorConfig(components=25),
        DecoderConfig(text_encoder=TransformerConfig(64)),
        UpsamplerConfig(UNetConfig(multipliers=(1, 2.5, 3))),
    ],
)
def test_round_trip_through_text(network: NetworkConfig):
    config = TrainConfig("tiny", network, clip="clip.safetensors", tags={"author": "me"})
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert from_json(to_json(network)) == network
    assert to_json(config)["schema_version"] == 1 and to_json(config)["network"]["type"] == type(network).__name__


def _set(path: str, value: Any) -> dict[str, Any]:
    data = deepcopy(to_json(TrainConfig("tiny", DecoderConfig())))
    *folders, leaf = path.split(".")
    node = data
    for folder in folders:
        node = node[folder]
    if value is ...:
        del node[leaf]
    else:
        node[leaf] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("network.unet.wings", 2, r"config.network.unet \(UNetConfig\) has unknown wings"),
        ("network", ..., r"config \(TrainConfig\) has missing network"),
        ("network.size", "64", "config.network.size is '64', expected int"),
        ("network.size", True, "config.network.size is True, expected int"),
        ("diffusion.schedule", "zigzag", "config.diffusion.schedule is 'zigzag'"),
        ("network.unet.multipliers", [1, "x"], "config.network.unet.multipliers is 'x', expected int or float"),
        ("network.type", "os.system", "config.network has the unknown type 'os.system'"),
        ("network.type", "OptimConfig", "config.network is 'OptimConfig', expected ClipConfig or PriorConfig"),
        ("diffusion.type", "OptimConfig", "config.diffusion is 'OptimConfig', expected DiffusionConfig"),
        ("type", ["TrainConfig"], "config has the unknown type"),
        ("schema_version", 99, "schema version 99, and this unclip_jax reads 1"),
        ("schema_version", ..., "has no schema_version"),
    ],
)
def test_anything_unexpected_is_named(path: str, value: Any, sentence: str):
    with pytest.raises(CheckpointError, match=sentence):
        from_json(_set(path, value))


def test_what_is_no_config_is_refused():
    for data in (None, 3, [], {}, "x"):
        with pytest.raises(CheckpointError, match="not written by unclip_jax"):
            from_json(data)
