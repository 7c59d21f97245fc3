"""One U-Net for the decoder and both upsamplers (ADM, arXiv 2105.05233, in the layout of Karlo's decoder)."""

from functools import cache
from itertools import repeat
from math import prod

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Num

from unclip_jax.config import UNetConfig
from unclip_jax.models.precision import dtype_of
from unclip_jax.models.remat import remembering
from unclip_jax.models.unet_blocks import (
    AttentionBlock,
    GroupNorm,
    ResBlock,
    conv,
    dense,
    fold,
    timestep_embedding,
    unfold,
    visible_keys,
)
from unclip_jax.sharding import check_height, rows


def level_widths(config: UNetConfig) -> tuple[int, ...]:
    """Channels of each level, finest first; ValueError where groups or heads do not divide them."""
    widths = tuple(int(config.channels * multiplier) for multiplier in config.multipliers)
    if any(width % config.groups for width in widths):
        raise ValueError(f"every width of {widths} must be a multiple of groups={config.groups}")
    attended = {width for level, width in enumerate(widths) if 2**level in config.attention_factors}
    attended |= {widths[-1]} if config.middle_attention else set()
    if any(width % config.head_channels for width in attended):
        raise ValueError(f"every width with attention {sorted(attended)} must be a multiple of {config.head_channels=}")
    return widths


class UNet(nn.Module):
    """The network: x_t, its timestep and optional conditions in, raw prediction out.

    Submodules: stem, time_0, time_1, down_{level}_{block}, down_{level}_attention_{block}, down_{level}_downsample,
    middle_0, middle_attention, middle_1, up_{level}_{block}, up_{level}_attention_{block}, up_{level}_upsample,
    out_norm, out. Levels count from the finest on both paths.
    """

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        embedding: Float[Array, "b e"] | None = None,
        context: Float[Array, "b m d"] | None = None,
        context_mask: Bool[Array, "b m"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b h w out"]:
        """Predict; float32 [b h w out_channels].

        x: [b h w in_channels]. t: timesteps of the training schedule. embedding: [b config.embedding_dim], added to
        the time embedding. context: [b m context_dim] extra attention keys, of which context_mask hides the false.
        Raises ValueError if the side does not suit the levels or the learned positions, or if context is missing
        or unexpected.
        """
        config = self.config
        widths = level_widths(config)
        lowest = len(widths) - 1
        _check_inputs(config, x, context)
        norm = {"groups": config.groups, "epsilon": config.norm_epsilon, "dtype": config.dtype}

        hidden = dense(config.embedding_dim, config.dtype, "time_0")(timestep_embedding(t, config.channels))
        time = dense(config.embedding_dim, config.dtype, "time_1")(nn.silu(hidden))
        if embedding is not None:
            time = time + embedding.astype(time.dtype)
        time = rows(time)
        if context is not None:
            context = rows(context.astype(dtype_of(config.dtype)))

        # All blocks' keys at once: each would else make its own, anew on the way back.
        blocks = len(widths) * (2 * config.depth + 1) + 2 * lowest + 2
        drops = config.dropout > 0 and not deterministic
        keys = iter(jax.random.split(self.make_rng("dropout"), blocks)) if drops else repeat(None)

        def residual(h: Array, width: int, name: str, resample: str | None = None) -> Array:
            block = ResBlock(
                width, scale_shift=config.scale_shift, dropout=config.dropout, resample=resample, name=name, **norm
            )
            return rows(remembering(config.remat, ResBlock.__call__)(block, h, time, next(keys)))

        @cache
        def seen(sides: tuple[int, ...]) -> Array | None:
            return None if context is None or context_mask is None else visible_keys(context_mask, prod(sides))

        def attention(h: Array, name: str) -> Array:
            block = AttentionBlock(head_channels=config.head_channels, name=name, **norm)
            return rows(remembering(config.remat, AttentionBlock.__call__)(block, h, context, seen(h.shape[1:3])))

        def positions(h: Array, name: str) -> Array:
            if config.position_grid is None:
                return h
            grid = self.param(name, nn.initializers.normal(0.02), (1, *h.shape[1:]), jnp.float32)
            return h + grid.astype(h.dtype)

        h = fold(x.astype(dtype_of(config.dtype)), config.patch)
        if not self.is_initializing():
            check_height(h.shape[1])
        h = conv(widths[0], config.dtype, "stem")(h)
        h = rows(positions(h, "positions"))
        skips = [h]
        for level, width in enumerate(widths):
            for block in range(config.depth):
                h = residual(h, width, f"down_{level}_{block}")
                if 2**level in config.attention_factors:
                    h = attention(h, f"down_{level}_attention_{block}")
                skips.append(h)
            if level < lowest:
                h = residual(h, width, f"down_{level}_downsample", "down")
                if level + 1 == lowest:
                    h = positions(h, "low_positions")
                skips.append(h)

        h = residual(h, widths[-1], "middle_0")
        if config.middle_attention:
            h = attention(h, "middle_attention")
        h = residual(h, widths[-1], "middle_1")

        for level, width in reversed(list(enumerate(widths))):
            for block in range(config.depth + 1):
                h = residual(jnp.concatenate([h, skips.pop()], axis=-1), width, f"up_{level}_{block}")
                if 2**level in config.attention_factors:
                    h = attention(h, f"up_{level}_attention_{block}")
            if level > 0:
                h = residual(h, width, f"up_{level}_upsample", "up")

        h = nn.silu(GroupNorm(name="out_norm", **norm)(h))
        h = conv(config.out_channels * config.patch**2, config.dtype, "out", zero=True)(h)
        return rows(unfold(h.astype(jnp.float32), config.patch))


def _check_inputs(config: UNetConfig, x: Array, context: Array | None) -> None:
    """Refuse what would fail later with a message about shapes that the caller never wrote."""
    _, height, width, channels = x.shape
    if channels != config.in_channels:
        raise ValueError(f"the U-Net takes {config.in_channels} channels, the input has {channels}")
    unit = config.patch * 2 ** (len(config.multipliers) - 1)
    if height % unit or width % unit:
        raise ValueError(f"the sides {height} x {width} must be multiples of {unit} ({len(config.multipliers)} levels)")
    grid = config.position_grid
    if grid is not None and (height, width) != (grid * config.patch, grid * config.patch):
        side = grid * config.patch
        raise ValueError(f"learned positions fix the input to {side} x {side} pixels, it is {height} x {width}")
    if (context is None) != (config.context_dim is None):
        raise ValueError(
            f"context_dim={config.context_dim}, but context is {'missing' if context is None else 'given'}"
        )
