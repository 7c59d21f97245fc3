from collections.abc import Callable, Mapping
from typing import Any

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

        from unclip_jax.interop.loading import load_params
        from unclip_jax.interop.sources import TensorSource

        return load_params(entries, TensorSource(Path("oracle"), tensors), shapes)

    return filled
