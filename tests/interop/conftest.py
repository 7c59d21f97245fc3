import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

# Nothing of the package is imported up here: pytest loads this file before jaxtyping's import hook is in place.

DOWN = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
UP = ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")


class Oracle:
    """Tiny models of diffusers with the settings of Karlo's, on the CPU, every tensor away from zero and one."""

    def __init__(self) -> None:
        import diffusers
        import torch
        from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

        torch.set_num_threads(2)
        self.torch, self.diffusers, self.projections_class = torch, diffusers, UnCLIPTextProjModel

    def prior(self, **changes: Any) -> Any:
        settings = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 24}
        return self._perturbed(self.diffusers.PriorTransformer, settings | {"num_embeddings": 11} | changes)

    def decoder(self, widths: tuple[int, ...] = (32, 64), attends: tuple[bool, ...] = (False, True), **changes: Any):
        settings = self._unet(widths, attends) | {
            "in_channels": 3,
            "out_channels": 6,
            "attention_head_dim": 16,
            "class_embed_type": "identity",
            "cross_attention_dim": 32,
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "resnet_time_scale_shift": "scale_shift",
            "sample_size": 16,
        }
        return self._perturbed(self.diffusers.UNet2DConditionModel, settings | changes)

    def projections(self, **changes: Any) -> Any:
        settings = {"clip_embeddings_dim": 24, "time_embed_dim": 128, "cross_attention_dim": 32}
        return self._perturbed(self.projections_class, settings | changes)

    def upsampler(self, widths: tuple[int, ...] = (32, 64), **changes: Any) -> Any:
        settings = self._unet(widths, (False,) * len(widths)) | {"in_channels": 6, "add_attention": False}
        return self._perturbed(self.diffusers.UNet2DModel, settings | {"sample_size": 64} | changes)

    def scheduler(self, **settings: Any) -> Any:
        return self.diffusers.UnCLIPScheduler(**settings)

    def tensors(self, model: Any) -> dict[str, np.ndarray]:
        return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    def call(self, function: Callable[..., Any], **given: Any) -> Any:
        """A model's answer to arrays, as numpy; pictures stay as torch has them."""
        for name, value in given.items():
            if hasattr(value, "__array__") and not isinstance(value, self.torch.Tensor):
                given[name] = self.torch.from_numpy(np.array(value))
        with self.torch.no_grad():
            answer = function(**given)
        return [item.numpy() for item in answer] if isinstance(answer, tuple) else answer[0].numpy()

    def _unet(self, widths: tuple[int, ...], attends: tuple[bool, ...]) -> dict[str, Any]:
        return {
            "block_out_channels": widths,
            "down_block_types": tuple(DOWN[a] for a in attends),
            "up_block_types": tuple(UP[a] for a in reversed(attends)),
            "layers_per_block": 1,
            "norm_num_groups": 8,
        }

    def _perturbed(self, kind: Any, settings: dict[str, Any]) -> Any:
        self.torch.manual_seed(0)
        model = kind(**settings).eval()
        for tensor in model.parameters():
            if float(tensor.detach().std()) == 0 or tensor.ndim == 1:
                tensor.data += 0.3 * self.torch.randn_like(tensor)
        return model


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="session")
def fill() -> Callable[..., dict[str, Any]]:
    """The tree of a shape tree, filled from tensors by a table."""

    def filled(entries: list, tensors: Mapping[str, np.ndarray], shapes: Any) -> dict[str, Any]:
        from pathlib import Path

        from unclip_jax.checkpoint.sources import TensorSource
        from unclip_jax.interop.loading import load_params

        return load_params(entries, TensorSource(Path("oracle"), tensors), shapes)

    return filled


class TinyKarlo(NamedTuple):
    """A tiny Karlo in the published layout: both repositories' folders, and both pipelines as diffusers loads them."""

    text: Path
    picture: Path
    text_pipeline: Any
    picture_pipeline: Any


@pytest.fixture(scope="session")
def tiny_karlo(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> TinyKarlo:
    """Contexts of 11 tokens, pictures of 16 and 32 px, embeddings of 24."""
    import diffusers.pipelines
    import transformers
    from diffusers.pipelines.deprecated import unclip

    from unclip_jax.data.tokenizer import ClipTokenizer
    from unclip_jax.interop.clip_tokenizer import save_tokenizer

    root = tmp_path_factory.mktemp("karlo")
    size = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 24}
    text = transformers.CLIPTextConfig(
        **size, hidden_size=24, vocab_size=49408, max_position_embeddings=11, eos_token_id=2
    )
    vision = transformers.CLIPVisionConfig(**size, hidden_size=32, image_size=32, patch_size=8)
    towers = {
        "text_encoder": transformers.CLIPTextModelWithProjection(text),
        "image_encoder": transformers.CLIPVisionModelWithProjection(vision),
    }
    for tower in towers.values():
        for tensor in tower.eval().parameters():
            tensor.data += (0.2 if tensor.ndim == 1 else 0.05) * oracle.torch.randn_like(tensor)
    last = oracle.upsampler((32,), sample_size=32)
    for tensor in last.parameters():
        tensor.data += 0.05 * oracle.torch.randn_like(tensor)
    last.register_to_config(sample_size=None)  # as published

    save_tokenizer(ClipTokenizer(11), root / "tokenizer")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = root / "tokenizer" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "!"}))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(root / "tokenizer")
    prior_scheduler = oracle.scheduler(prediction_type="sample", clip_sample_range=5.0)
    shared = towers | {
        "tokenizer": tokenizer,
        "prior": oracle.prior(),
        "text_proj": oracle.projections(),
        "decoder": oracle.decoder((32,), (True,)),
        "super_res_first": oracle.upsampler((32,), sample_size=32),
        "super_res_last": last,
        "prior_scheduler": prior_scheduler,
        "decoder_scheduler": oracle.scheduler(variance_type="learned_range"),
        "super_res_scheduler": oracle.scheduler(),
        "feature_extractor": transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
    }
    only_text, only_picture = ("prior", "prior_scheduler"), ("image_encoder", "feature_extractor")
    diffusers.pipelines.unclip = unclip  # without which no published folder loads (diffusers 0.42)
    loaded = []
    for name, kind, absent in (
        ("text", unclip.UnCLIPPipeline, only_picture),
        ("picture", unclip.UnCLIPImageVariationPipeline, only_text),
    ):
        kind(**{key: part for key, part in shared.items() if key not in absent}).save_pretrained(root / name)
        index = json.loads((root / name / "model_index.json").read_text())
        index["text_proj"] = ["unclip", "UnCLIPTextProjModel"]
        (root / name / "model_index.json").write_text(json.dumps(index))
        for file in (root / name / "tokenizer").iterdir():
            file.unlink()
        for file in (root / "tokenizer").iterdir():
            (root / name / "tokenizer" / file.name).write_bytes(file.read_bytes())
        loaded.append(kind.from_pretrained(root / name))
        loaded[-1].set_progress_bar_config(disable=True)
    return TinyKarlo(root / "text", root / "picture", *loaded)
