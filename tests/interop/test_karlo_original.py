import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from unclip_jax.cascade import load_cascade
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.sources import TensorSource
from unclip_jax.cli import main
from unclip_jax.config import DecoderConfig, PriorConfig, TrainConfig, UNetConfig, UpsamplerConfig
from unclip_jax.interop.clip import clip_folder
from unclip_jax.interop.folder import load_folders
from unclip_jax.interop.importing import original_cascade, save_cascade
from unclip_jax.interop.karlo import decoder_config, prior_config, upsampler_config
from unclip_jax.interop.karlo_names import decoder_entries, prior_entries, whitening_entries
from unclip_jax.interop.karlo_original import original_decoder, original_prior, original_upsampler
from unclip_jax.interop.names import check_names

PRIOR = {
    "positional_embedding": "positional_embedding",
    "prd_embedding": "prd_emb",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "proj_in": "clip_img_proj",
    "embedding_proj": "text_emb_proj",
    "encoder_hidden_states_proj": "text_enc_proj",
    "norm_out": "final_ln",
    "proj_to_clip_embeddings": "out_proj",
}
PRIOR_BLOCK = {
    "norm1": "ln_1",
    "attn1.to_q": "attn.c_qkv",
    "attn1.to_out.0": "attn.c_proj",
    "norm3": "ln_2",
    "ff.net.0.proj": "mlp.c_fc",
    "ff.net.2": "mlp.c_proj",
}
PROJECTIONS = {
    "learned_classifier_free_guidance_embeddings": "cf_param",
    "embedding_proj": "text_feat_proj",
    "clip_image_embeddings_project_to_time_embeddings": "clip_emb",
    "clip_extra_context_tokens_proj": "clip_tok_proj",
    "encoder_hidden_states_proj": "text_seq_proj.0",
    "text_encoder_hidden_states_norm": "text_seq_proj.1",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "add_k_proj": "encoder_kv",
    "to_out.0": "proj_out",
}
# Two levels of one block: the blocks of the original count through the levels.
DECODER_BLOCKS = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0": "input_blocks.2.0",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0": "output_blocks.1.2",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
}
UPSAMPLER_BLOCKS = {key: name for key, name in DECODER_BLOCKS.items() if "attentions" not in key} | {
    "mid_block.resnets.1": "middle_block.1",
    "up_blocks.0.upsamplers.0": "output_blocks.1.1",
}
TOGETHER = {
    "to_q": ("to_q", "to_k", "to_v"),
    "add_k_proj": ("add_k_proj", "add_v_proj"),
}


def original(
    tensors: Mapping[str, np.ndarray],
    modules: Mapping[str, str],
    blocks: Mapping[str, str],
    within: Mapping[str, str],
    head: int,
    convolutions: bool,
) -> dict[str, np.ndarray]:
    """Tensors of diffusers as the original had them: fused head by head, attention's maps as 1 x 1 convolutions."""
    found = {}
    for name, tensor in tensors.items():
        stem, kind = name.rsplit(".", 1) if name.endswith((".weight", ".bias")) else (name, "")
        block = next((block for block in blocks if stem.startswith(f"{block}.")), None)
        inner = stem.removeprefix(f"{block}.")
        last = inner.rpartition(".")[2]
        if last in ("to_k", "to_v", "add_v_proj"):
            continue
        if last in TOGETHER:
            parts = [tensors[f"{stem.removesuffix(last)}{part}.{kind}"] for part in TOGETHER[last]]
            heads = [part[start : start + head] for start in range(0, len(tensor), head) for part in parts]
            tensor = np.concatenate(heads)
        if convolutions and kind == "weight" and (last in TOGETHER or inner == "to_out.0"):
            tensor = tensor[..., None]
        renamed = modules[stem] if block is None else f"{blocks[block]}.{within[inner]}"
        found[f"{renamed}.{kind}".removesuffix(".")] = tensor
    return found


def prefixed(prefix: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def source(tensors: Mapping[str, np.ndarray]) -> TensorSource:
    return TensorSource(Path("original.ckpt"), tensors)


def same(view: TensorSource, tensors: Mapping[str, np.ndarray]) -> bool:
    assert view.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    return all(np.array_equal(view.read(name), tensor) for name, tensor in tensors.items())


@pytest.fixture(scope="module")
def prior(oracle) -> tuple[Any, dict[str, np.ndarray], dict[str, np.ndarray]]:
    model = oracle.prior()
    tensors = oracle.tensors(model)
    blocks = {f"transformer_blocks.{layer}": f"transformer.resblocks.{layer}" for layer in range(2)}
    network = {name: tensor for name, tensor in tensors.items() if not name.startswith("clip_")}
    return (
        prior_config(model.config),
        tensors,
        prefixed("model.", original(network, PRIOR, blocks, PRIOR_BLOCK, 16, False)),
    )


def test_prior(prior):
    config, tensors, ckpt = prior
    statistics = source({"0": tensors["clip_mean"][0], "1": tensors["clip_std"][0]})
    view = original_prior(source(ckpt), statistics, config)
    assert same(view, tensors)
    check_names([*prior_entries(config), *whitening_entries(config)], view.shapes, "the prior")
    with pytest.raises(CheckpointError, match="ViT-L-14_stats"):
        original_prior(source(ckpt), source({"0": tensors["clip_mean"][0]}), config)


def test_decoder(oracle):
    unet, projections = oracle.decoder(), oracle.projections()
    config = decoder_config(unet.config, projections.config)
    ckpt = original(oracle.tensors(unet), UNET, DECODER_BLOCKS, UNET_BLOCK, 16, True)
    ckpt |= original(oracle.tensors(projections), PROJECTIONS, {}, {}, 16, False)
    view = original_decoder(source(prefixed("model.", ckpt)), config)
    assert same(view, oracle.tensors(unet) | oracle.tensors(projections))
    check_names([entry for table in decoder_entries(config) for entry in table], view.shapes, "the decoder")


def test_both_upsamplers_of_one_file(oracle):
    model = oracle.upsampler()
    config, first = upsampler_config(model.config), oracle.tensors(model)
    last = {name: tensor + 1 for name, tensor in first.items()}
    ckpt = {}
    for prefix, tensors in (("model_first_steps.", first), ("model_last_step.", last)):
        ckpt |= prefixed(prefix, original(tensors, UNET, UPSAMPLER_BLOCKS, UNET_BLOCK, 16, True))
    assert same(original_upsampler(source(ckpt), config, last=False), first)
    assert same(original_upsampler(source(ckpt), config, last=True), last)


def test_missing_unknown_and_misshapen_tensors_are_named(prior):
    config, tensors, ckpt = prior
    statistics = source({"0": tensors["clip_mean"][0], "1": tensors["clip_std"][0]})
    entries = [*prior_entries(config), *whitening_entries(config)]
    fused = "model.transformer.resblocks.1.attn.c_qkv.weight"
    for damaged, named in (
        (
            {name: tensor for name, tensor in ckpt.items() if name != fused},
            r"lacks transformer_blocks.1.attn1.to_q.weight",
        ),
        (ckpt | {"model.padding_embedding": np.zeros((15, 32))}, "unknown model.padding_embedding"),
        (ckpt | {fused: ckpt[fused][:-1]}, r"mis-shaped transformer_blocks.1.attn1.to_q.weight"),
    ):
        with pytest.raises(CheckpointError, match=named):
            check_names(entries, original_prior(source(damaged), statistics, config).shapes, "the prior")


UPSAMPLER = UpsamplerConfig(unet=UNetConfig(in_channels=6, scale_shift=False))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("input_blocks.12.0.emb_layers.1.bias", "down_blocks.2.downsamplers.0.time_emb_proj.bias"),
        ("input_blocks.15.1.proj_out.bias", "down_blocks.3.attentions.2.to_out.0.bias"),
        ("output_blocks.3.2.in_layers.2.bias", "up_blocks.0.upsamplers.0.conv1.bias"),
        ("output_blocks.11.2.out_layers.3.bias", "up_blocks.2.upsamplers.0.conv2.bias"),
        ("output_blocks.15.0.skip_connection.bias", "up_blocks.3.resnets.3.conv_shortcut.bias"),
    ],
)
def test_blocks_of_the_full_size(name, theirs):
    tensor = np.zeros(1)
    assert set(original_decoder(source({f"model.{name}": tensor}), DecoderConfig()).arrays) == {theirs}
    if "attentions" not in theirs:
        plain = name.replace(".2.in", ".1.in").replace(".2.out_layers", ".1.out_layers")
        view = original_upsampler(source({f"model_last_step.{plain}": tensor}), UPSAMPLER, last=True)
        assert set(view.arrays) == {theirs}


def test_queries_of_the_full_size():
    config = PriorConfig()
    fused = np.broadcast_to(np.arange(3 * 2048, dtype=np.float32), (3 * 2048,))
    name = "model.transformer.resblocks.7.attn.c_qkv.bias"
    view = original_prior(source({name: fused}), source({"0": np.zeros(768), "1": np.ones(768)}), config)
    keys = view.read("transformer_blocks.7.attn1.to_k.bias")
    assert keys[:65].tolist() == [*range(64, 128), 192 + 64]


@pytest.fixture(scope="module")
def models(tiny_karlo, oracle) -> dict[str, Any]:
    last = oracle.upsampler(sample_size=32)
    for tensor in last.parameters():
        tensor.data += 1
    networks = {"decoder": oracle.decoder(), "super_res_first": oracle.upsampler(sample_size=32)}
    pipeline = tiny_karlo.text_pipeline
    return networks | {"super_res_last": last, "prior": pipeline.prior, "text_proj": pipeline.text_proj}


@pytest.fixture(scope="module")
def published(tiny_karlo, models, tmp_path_factory):
    """The tiny Karlo with two levels in its U-Nets."""
    folder = shutil.copytree(tiny_karlo.text, tmp_path_factory.mktemp("published") / "karlo")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return load_folders([folder, tiny_karlo.picture])


@pytest.fixture(scope="module")
def originals(models, oracle, published, tmp_path_factory) -> tuple[Path, Path]:
    """A folder of original checkpoints of the same, and its CLIP's in Hugging Face's layout."""
    root = tmp_path_factory.mktemp("originals")
    clip_folder(published.clip.params, published.clip.config.network, root / "clip", published.tokenizer)
    folder = root / "karlo"
    folder.mkdir()

    def save(name: str, tensors: Mapping[str, np.ndarray]) -> None:
        weights = {key: oracle.torch.from_numpy(np.array(tensor)) for key, tensor in tensors.items()}
        oracle.torch.save({"state_dict": weights, "global_step": 7}, folder / name)

    tensors = oracle.tensors(models["prior"])
    blocks = {f"transformer_blocks.{layer}": f"transformer.resblocks.{layer}" for layer in range(2)}
    statistics = tuple(oracle.torch.from_numpy(tensors.pop(name)[0]) for name in ("clip_mean", "clip_std"))
    oracle.torch.save(statistics, folder / "ViT-L-14_stats.th")
    network = original(tensors, PRIOR, blocks, PRIOR_BLOCK, 16, False)
    save("prior-ckpt-step=01000000-of-01000000.ckpt", prefixed("model.", network))
    network = original(oracle.tensors(models["decoder"]), UNET, DECODER_BLOCKS, UNET_BLOCK, 16, True)
    network |= original(oracle.tensors(models["text_proj"]), PROJECTIONS, {}, {}, 16, False)
    save("decoder-ckpt-step=01000000-of-01000000.ckpt", prefixed("model.", network))
    both = {}
    for prefix, model in (("model_first_steps.", "super_res_first"), ("model_last_step.", "super_res_last")):
        tensors = oracle.tensors(models[model])
        both |= prefixed(prefix, original(tensors, UNET, UPSAMPLER_BLOCKS, UNET_BLOCK, 16, True))
    save("improved-sr-ckpt-step=1.2M.ckpt", both)
    return folder, root / "clip"


def test_a_folder_of_originals_becomes_the_cascade_of_the_published_one(originals, published, tmp_path):
    folder, clip = originals
    of_a_name = {"karlo_prior": published.prior, "karlo_decoder": published.decoder}
    of_a_name["karlo_up256"] = published.upsamplers[0]

    def configs(name: str) -> TrainConfig:
        return of_a_name[name].config

    save_cascade(original_cascade(folder, clip, configs), tmp_path / "ours", "auto", {})
    cascade = load_cascade(tmp_path / "ours")
    for ours, theirs in (
        (cascade.clip, published.clip),
        (cascade.prior, published.prior),
        (cascade.decoder, published.decoder),
        (cascade.upsamplers[0], published.upsamplers[0]),
    ):
        jax.tree.map(np.testing.assert_array_equal, dict(ours.params), dict(theirs.params))
        jax.tree.map(np.testing.assert_array_equal, ours.constants, theirs.constants)
        assert (ours.config.network, ours.config.diffusion) == (theirs.config.network, theirs.config.diffusion)


def test_originals_by_command(originals, tmp_path, capsys):
    folder, clip = originals
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    for kind in (
        "original prior",
        "original decoder",
        "original upsamplers",
        "whitening statistics",
        "yes, with a CLIP",
    ):
        assert kind in shown
    assert main(["import", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "--clip" in capsys.readouterr().err
    # The tiny networks are not of Karlo's published size, which is what a folder of originals has to be.
    assert main(["import", str(folder), "--clip", str(clip), "--out", str(tmp_path / "out")]) == 1
    assert "belongs to another network" in capsys.readouterr().err
    (folder / "ViT-L-14_stats.th").rename(tmp_path / "aside")
    assert main(["import", str(folder), "--clip", str(clip), "--out", str(tmp_path / "out")]) == 1
    assert "has no ViT-L-14_stats.th" in capsys.readouterr().err
    (tmp_path / "aside").rename(folder / "ViT-L-14_stats.th")
    assert not list(tmp_path.iterdir())
