"""Karlo's published sizes and configs: names and shapes without memory, settings both ways, refusals."""

import hashlib
import math
import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.config import (
    DecoderConfig,
    DiffusionConfig,
    PriorConfig,
    TransformerConfig,
    UNetConfig,
    UpsamplerConfig,
)
from unclip_jax.interop.karlo import (
    decoder_config,
    decoder_json,
    diffusion_config,
    diffusion_json,
    prior_config,
    prior_json,
    upsampler_config,
    upsampler_json,
)
from unclip_jax.interop.karlo_names import decoder_entries, prior_entries, upsampler_entries, whitening_entries
from unclip_jax.stages import build

CONFIGS = Path(__file__).parents[2] / "configs"

# As the hub has them (kakaobrain/karlo-v1-alpha).
PRIOR = {
    "_class_name": "PriorTransformer",
    "_diffusers_version": "0.11.0.dev0",
    "additional_embeddings": 4,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "embedding_dim": 768,
    "num_attention_heads": 32,
    "num_embeddings": 77,
    "num_layers": 20,
}
DECODER = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 64,
    "block_out_channels": [320, 640, 960, 1280],
    "center_input_sample": False,
    "class_embed_type": "identity",
    "cross_attention_dim": 1536,
    "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 3,
    "layers_per_block": 3,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 64,
    "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "upcast_attention": False,
    "use_linear_projection": False,
}
PROJECTIONS = {
    "_class_name": "UnCLIPTextProjModel",
    "clip_embeddings_dim": 768,
    "clip_extra_context_tokens": 4,
    "cross_attention_dim": 1536,
    "time_embed_dim": 1280,
}
UPSAMPLER = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "add_attention": False,
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 960, 1280],
    "center_input_sample": False,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 4,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 6,
    "layers_per_block": 3,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 3,
    "resnet_time_scale_shift": "default",
    "sample_size": 256,
    "time_embedding_type": "positional",
    "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
}
SCHEDULER = {
    "_class_name": "UnCLIPScheduler",
    "clip_sample": True,
    "clip_sample_range": 5.0,
    "num_train_timesteps": 1000,
    "prediction_type": "sample",
    "variance_type": "fixed_small_log",
}

# Tensors, numbers and digest of the sorted "name [shape]" lines of what diffusers 0.42.1 builds from these configs.
PUBLISHED = {
    "prior": (338, 1_022_030_080, "3140c6705ff6b7af0254fe35b0348b76441af09710d078bfb77053abd8fae6aa"),
    "decoder": (716, 885_439_686, "f581bbc3c1b9bf0f47e71a9c4909d7910b46388ef9ab6495ac037b957d05c76a"),
    "projections": (11, 7_878_400, "45a7d86303ec4677937cbcfe14ad7878d67b8fa262ce6f5ae396543ee93e4b17"),
    "upsampler": (408, 691_579_523, "51c2894c07c3dc9912629759c3d9169eb8da7fec252761355160fc2248e98df7"),
}
SAMPLE = {
    "prior": (
        "transformer_blocks.19.ff.net.0.proj.weight",
        (8192, 2048),
        ("transformer", "block_19", "mlp_in", "kernel"),
    ),
    "decoder": (
        "up_blocks.1.attentions.3.add_k_proj.weight",
        (960, 1536),
        ("unet", "up_2_attention_3", "context_key", "kernel"),
    ),
    "projections": (
        "clip_image_embeddings_project_to_time_embeddings.weight",
        (1280, 768),
        ("image_to_time", "kernel"),
    ),
    "upsampler": ("up_blocks.2.resnets.3.conv_shortcut.weight", (640, 960, 1, 1), ("unet", "up_1_3", "skip", "kernel")),
}


def published_config(name: str) -> Any:
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()


@pytest.fixture(scope="module")
def tables() -> dict[str, list]:
    prior, decoder, upsampler = prior_config(PRIOR), decoder_config(DECODER, PROJECTIONS), upsampler_config(UPSAMPLER)
    unet, projections = decoder_entries(decoder)
    return {
        "prior": [*prior_entries(prior), *whitening_entries(prior)],
        "decoder": unet,
        "projections": projections,
        "upsampler": upsampler_entries(upsampler),
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_name_every_published_tensor(tables, name):
    lines = sorted(f"{entry.theirs} {list(entry.shape)}" for entry in tables[name])
    numbers = sum(math.prod(entry.shape) for entry in tables[name])
    assert (len(lines), numbers, hashlib.sha256("\n".join(lines).encode()).hexdigest()) == PUBLISHED[name]
    assert SAMPLE[name] in [entry[:3] for entry in tables[name]]


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("karlo_prior", ["prior"]),
        ("karlo_decoder", ["decoder", "projections"]),
        ("karlo_up256", ["upsampler"]),
        ("karlo_up256_last", ["upsampler"]),
    ],
)
def test_tables_fill_every_parameter_once(tables, config, parts):
    entries = [entry for part in parts for entry in tables[part] if entry.ours[0] != "whitening"]
    tree = jax.eval_shape(
        build(published_config(config), published_config("karlo_clip").network).init, jax.random.key(0)
    )
    leaves = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    assert Counter(entry.ours for entry in entries) == Counter(leaves.keys())
    assert all(math.prod(entry.shape) == leaves[entry.ours].size for entry in entries)


def test_published_settings_are_the_configs_of_this_repository():
    prior, decoder, upsampler = (published_config(f"karlo_{name}") for name in ("prior", "decoder", "up256"))
    assert prior_config(PRIOR) == replace(prior.network, text_drop=PriorConfig.text_drop)
    drops = {"image_drop": DecoderConfig.image_drop, "text_drop": DecoderConfig.text_drop}
    without_dropout = replace(decoder.network.unet, dropout=0.0)
    assert decoder_config(DECODER, PROJECTIONS) == replace(decoder.network, unet=without_dropout, **drops)
    assert upsampler_config(UPSAMPLER) == upsampler.network
    assert diffusion_config(SCHEDULER) == prior.diffusion
    learned = {"prediction_type": "epsilon", "variance_type": "learned_range", "clip_sample_range": 1.0}
    assert diffusion_config(SCHEDULER | learned) == decoder.diffusion
    assert diffusion_config({}) == upsampler.diffusion


def test_settings_come_back_with_the_defaults_of_diffusers(oracle):
    def plain(config: Any) -> dict[str, Any]:
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
        kept = {"_class_name": lists["_class_name"]} if "_class_name" in lists else {}
        return kept | {key: value for key, value in lists.items() if not key.startswith("_")}

    def written(model: Any) -> dict[str, Any]:
        return plain({"_class_name": type(model).__name__, **model.config})

    prior = oracle.prior()
    assert prior_json(prior_config(prior.config)) == written(prior)
    decoder, projections = oracle.decoder(widths=(32, 56, 80), attends=(True, False, True)), oracle.projections()
    ours = decoder_config(decoder.config, projections.config)
    assert decoder_json(ours) == (written(decoder), written(projections))
    upsampler = oracle.upsampler(widths=(48, 80), norm_eps=1e-6)
    assert upsampler_json(upsampler_config(upsampler.config)) == written(upsampler)
    for settings in (SCHEDULER, {"clip_sample": False}, {"variance_type": "learned_range", "num_train_timesteps": 50}):
        scheduler = oracle.scheduler(**{k: v for k, v in settings.items() if k != "_class_name"})
        assert diffusion_json(diffusion_config(settings)) == written(scheduler)


def test_every_width_survives_the_multipliers():
    for channels in (24, 40, 56):
        for width in range(8, 800, 8):
            settings = {"block_out_channels": [channels, width], "norm_num_groups": 8}
            types = {
                "down_block_types": UPSAMPLER["down_block_types"][:2],
                "up_block_types": UPSAMPLER["up_block_types"][:2],
            }
            config = upsampler_config(UPSAMPLER | settings | types)
            assert upsampler_json(config)["block_out_channels"] == [channels, width]


def test_last_upsampler_takes_its_size_from_the_first():
    last = UPSAMPLER | {"sample_size": None}
    assert upsampler_config(last, low_size=32, size=128) == replace(upsampler_config(UPSAMPLER), low_size=32, size=128)
    with pytest.raises(CheckpointError, match="sample_size=None"):
        upsampler_config(last)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"down_block_types": ["CrossAttnDownBlock2D"] * 4}, "down_block_types"),
        ({"up_block_types": DECODER["up_block_types"][::-1]}, "up_block_types"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"upcast_attention": True}, "upcast_attention"),
        ({"only_cross_attention": True}, "only_cross_attention"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"freq_shift": 1}, "freq_shift"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"encoder_hid_dim_type": "text_image_proj"}, "encoder_hid_dim_type"),
        ({"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift"),
        ({"layers_per_block": [3, 3, 2, 3]}, "layers_per_block"),
        ({"attention_head_dim": 60}, "multiple of config.head_channels"),
        ({"norm_num_groups": None}, "norm_num_groups"),
        ({"layers_per_block": 10**9}, "layers_per_block"),
        ({"block_out_channels": [320, 640]}, "block_out_channels"),
        ({"out_channels": 3}, "out_channels"),
        ({"cross_attention_dim": 768}, "cross_attention_dim"),
        ({"sample_size": None}, "sample_size"),
        ({"a_new_setting": 1}, "a_new_setting"),
        ({"_class_name": "UNet2DModel"}, "UNet2DModel"),
    ],
)
def test_decoder_settings_that_we_cannot_express_are_named(changes, named):
    with pytest.raises(CheckpointError, match=named):
        decoder_config(DECODER | changes, PROJECTIONS)


def test_settings_with_other_defaults_must_be_there():
    for missing in ("class_embed_type", "mid_block_type"):
        with pytest.raises(CheckpointError, match=missing):
            decoder_config({key: value for key, value in DECODER.items() if key != missing}, PROJECTIONS)
    with pytest.raises(CheckpointError, match="add_attention"):
        upsampler_config({key: value for key, value in UPSAMPLER.items() if key != "add_attention"})
    bare = {"_class_name": "PriorTransformer"}  # Karlo's are diffusers' defaults
    assert prior_config(bare) == prior_config(PRIOR)


@pytest.mark.parametrize(
    ("read", "settings", "named"),
    [
        (prior_config, PRIOR | {"added_emb_type": None}, "added_emb_type"),
        (prior_config, PRIOR | {"additional_embeddings": 3}, "additional_embeddings"),
        (prior_config, PRIOR | {"num_layers": True}, "num_layers"),
        (prior_config, PRIOR | {"dropout": "0.1"}, "dropout"),
        (prior_config, [PRIOR], "no JSON object"),
        (upsampler_config, UPSAMPLER | {"in_channels": 4}, "in_channels"),
        (upsampler_config, UPSAMPLER | {"out_channels": 4}, "out_channels"),
        (upsampler_config, UPSAMPLER | {"down_block_types": 3}, "down_block_types"),
        (upsampler_config, UPSAMPLER | {"add_attention": True}, "add_attention"),
        (diffusion_config, SCHEDULER | {"_class_name": "DDPMScheduler"}, "DDPMScheduler"),
        (diffusion_config, SCHEDULER | {"prediction_type": "v_prediction"}, "prediction_type"),
        (diffusion_config, SCHEDULER | {"beta_schedule": "linear"}, "beta_schedule"),
        (diffusion_config, SCHEDULER | {"clip_sample": "yes"}, "clip_sample"),
    ],
)
def test_other_settings_that_we_cannot_express_are_named(read, settings, named):
    with pytest.raises(CheckpointError, match=named):
        read(settings)


ATTENDING = UNetConfig(out_channels=6, attention_factors=(2, 4, 8), context_dim=1536, middle_attention=True)


@pytest.mark.parametrize(
    ("write", "config", "named"),
    [
        (prior_json, PriorConfig(text_dim=512), "width 512"),
        (prior_json, PriorConfig(), "embeddings of unit length"),
        (prior_json, PriorConfig(transformer=TransformerConfig(2048, 20, 32)), "causal"),
        (prior_json, PriorConfig(transformer=TransformerConfig(64, 1, 2, head_dim=16, causal=True)), "2 heads of 16"),
        (prior_json, PriorConfig(transformer=TransformerConfig(64, 1, 2, mlp_ratio=2.0, causal=True)), "mlp_ratio"),
        (decoder_json, DecoderConfig(unet=replace(ATTENDING, patch=8)), "patch stem of 8"),
        (decoder_json, DecoderConfig(unet=replace(ATTENDING, position_grid=8)), "learned positions"),
        (decoder_json, DecoderConfig(unet=replace(ATTENDING, out_channels=3)), "learned variances"),
        (decoder_json, DecoderConfig(unet=replace(ATTENDING, middle_attention=False)), "middle block"),
        (decoder_json, DecoderConfig(learned_null_text=True, image_scale=2.0), "image_scale, no learned null text"),
        (decoder_json, DecoderConfig(), "no null text but the empty caption's"),
        (decoder_json, DecoderConfig(text_embedding=False), "text embedding"),
        (decoder_json, DecoderConfig(text_dim=512), "width 512"),
        (decoder_json, DecoderConfig(text_encoder=TransformerConfig()), "text encoder"),
        (upsampler_json, UpsamplerConfig(unet=replace(ATTENDING, in_channels=6)), "attention in upsamplers"),
        (upsampler_json, UpsamplerConfig(unet=UNetConfig(in_channels=6, patch=4)), "patch stem"),
        (upsampler_json, UpsamplerConfig(residual=True), "adds to the resized picture"),
        (diffusion_json, DiffusionConfig(prediction="v"), "v-prediction"),
        (diffusion_json, DiffusionConfig(schedule="linear"), "linear schedule"),
    ],
)
def test_what_diffusers_lacks_is_named(write, config, named):
    with pytest.raises(CheckpointError, match=named):
        write(config)
