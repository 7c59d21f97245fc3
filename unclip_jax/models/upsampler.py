"""Upsamplers: the same U-Net with the low-resolution picture as further input channels (paper section 2.1)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key, Num

from unclip_jax.config import UpsamplerConfig
from unclip_jax.models.decoder import Condition, TextEncoder
from unclip_jax.models.unet import UNet
from unclip_jax.models.unet_blocks import dense
from unclip_jax.types import Params


def resize_low(low: Float[Array, "b k k2 c"], size: int) -> Float[Array, "b {size} {size} c"]:
    """Resize pictures to size x size by antialiased bicubic interpolation (a = -0.5), as Karlo does."""
    b, _, _, c = low.shape
    return jax.image.resize(low, (b, size, size, c), "cubic", antialias=True)


class Upsampler(nn.Module):
    """Pictures from smaller pictures, at any size that suits the U-Net's levels: it trains on crops.

    With config.text_encoder it also reads a caption (GLIDE, arXiv 2112.10741), through `condition`.
    """

    config: UpsamplerConfig

    def setup(self) -> None:
        """Create the U-Net and, where the config asks, the text encoder."""
        config = self.config
        self.unet = UNet(config.unet)
        if config.last_step:
            self.unet_last = UNet(config.unet)
        if config.text_encoder is not None:
            self.text_encoder = TextEncoder(config.text_encoder, config.vocab_size, config.context_length)
            self.text_to_time = dense(config.unet.embedding_dim, config.unet.dtype)

    def condition(self, tokens: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Condition:
        """The caption as a U-Net reads it, once per sample: the last token joins the time embedding (GLIDE)."""
        states, last = self.text_encoder(tokens, mask)
        return Condition(self.text_to_time(last), states, mask)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        low: Float[Array, "b h w 3"],
        condition: Condition | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b h w out"]:
        """The network's output for noisy x at t; low is the low-resolution picture already resized to x's size.

        With config.residual low is added to what the U-Net says, so that an untrained network enlarges bicubically.
        With config.last_step all examples share one t.
        """
        told = condition or (None, None, None)

        def first(module: "Upsampler", x: Array) -> Array:
            return module.unet(x, t, *told, deterministic=deterministic)

        def last(module: "Upsampler", x: Array) -> Array:
            return module.unet_last(x, t, *told, deterministic=deterministic)

        x = jnp.concatenate([x, low.astype(x.dtype)], axis=-1)
        if self.config.last_step and not self.is_initializing():
            output = nn.cond(t[0] == 0, last, first, self, x)
        else:
            output = first(self, x)
        return output + low if self.config.residual else output

    def initialise(self) -> Float[Array, "b h w out"]:
        """Touch every parameter with one example of zeros; for `module.init(key, method="initialise")`."""
        config, unet = self.config, self.config.unet
        side = (unet.position_grid or 2 ** (len(unet.multipliers) - 1)) * unet.patch
        picture = jnp.zeros((1, side, side, unet.in_channels))
        condition = None
        if config.text_encoder is not None:
            n = config.context_length
            condition = self.condition(jnp.zeros((1, n), jnp.int32), jnp.ones((1, n), bool))
        t = jnp.zeros((1,), jnp.int32)
        if config.last_step:
            self.unet_last(picture, t, *(condition or (None, None, None)))
        return self(picture[..., 3:], t, picture[..., :3], condition)


def init_upsampler(module: Upsampler, key: Key[Array, ""]) -> Params:
    """All of an upsampler's parameters, float32; under jit or eval_shape the pass through the network costs nothing."""
    return module.init(key, method="initialise")["params"]


__all__ = ["Upsampler", "init_upsampler", "resize_low"]
