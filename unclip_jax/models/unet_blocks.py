"""Blocks of the ADM U-Net (arXiv 2105.05233): group norm, residual block, attention with extra context keys.

Pictures are NHWC. Parameters are float32; every module computes in the dtype that it is given, while statistics and
softmax are float32.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Num

from unclip_jax.config import Dtype
from unclip_jax.models.precision import dtype_of, precision_of
from unclip_jax.models.transformer import attend, attend_flash, flash
from unclip_jax.sharding import convolution
from unclip_jax.types import PRNGKey


def timestep_embedding(t: Num[Array, " b"], width: int) -> Float[Array, "b {width}"]:
    """Sinusoids [cos | sin] of the timestep, frequencies exp(-ln(10000) k / half); [b width] float32, even width."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def fold(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 w2 c2"]:
    """Space to depth: patch x patch pixels become channels; [b h w c] -> [b h/p w/p p*p*c]."""
    if patch == 1:
        return x
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, patch * patch * c)


def unfold(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 w2 c2"]:
    """Depth to space, the inverse of fold; [b h w p*p*c] -> [b h*p w*p c]."""
    if patch == 1:
        return x
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, c // patch**2)


def downsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Mean of 2x2 pixels."""
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Nearest neighbour, twice the side."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def conv(features: int, dtype: Dtype, name: str, side: int = 3, zero: bool = False) -> nn.Conv:
    """A convolution that keeps height and width; zero starts it at nothing."""
    pad = side // 2
    return nn.Conv(
        features,
        (side, side),
        padding=((pad, pad), (pad, pad)),
        dtype=dtype_of(dtype),
        precision=precision_of(dtype),
        kernel_init=nn.initializers.zeros if zero else nn.initializers.lecun_normal(),
        conv_general_dilated=convolution(name),
        name=name,
    )


def dense(features: int, dtype: Dtype, name: str | None = None, zero: bool = False) -> nn.Dense:
    """A linear map of the last axis; zero starts it at nothing. Inside setup the attribute is the name."""
    return nn.Dense(
        features,
        dtype=dtype_of(dtype),
        precision=precision_of(dtype),
        kernel_init=nn.initializers.zeros if zero else nn.initializers.lecun_normal(),
        name=name,
    )


class GroupNorm(nn.Module):
    """Group normalisation over pixels and the channels of a group, with an optional shift and scale per example.

    Statistics are float32 sums per channel, which products with ones and zeros take to groups and back, and all of it
    ends in one a * x + b: reshaping the picture itself into groups breaks the lanes of a TPU and halves the speed of a
    residual block, and reshaping sums costs its compiler a tenth of its time.
    """

    groups: int
    epsilon: float
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        scale: Float[Array, "b c"] | None = None,
        shift: Float[Array, "b c"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Normalise x; then h * (1 + scale) + shift where they are given (arXiv 2105.05233, section 3)."""
        _, h, w, c = x.shape
        weight = self.param("scale", nn.initializers.ones, (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
        x32 = x.astype(jnp.float32)
        exact, lanes = jax.lax.Precision.HIGHEST, (self.groups, c // self.groups, self.groups)
        own, group = (jax.lax.broadcasted_iota(jnp.int32, lanes, axis) for axis in (0, 2))
        member = (own == group).astype(jnp.float32).reshape(c, self.groups)
        share = member * (self.groups / (h * w * c))
        mean, square = (jnp.dot(v.sum((1, 2)), share, precision=exact) for v in (x32, jnp.square(x32)))
        inverse = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + self.epsilon)
        mean, inverse = (jnp.dot(v, member.T, precision=exact) for v in (mean, inverse))
        a = inverse * weight
        offset = bias - mean * a
        if scale is not None and shift is not None:
            gain = 1.0 + scale.astype(jnp.float32)
            a, offset = a * gain, offset * gain + shift.astype(jnp.float32)
        return (x32 * a[:, None, None] + offset[:, None, None]).astype(dtype_of(self.dtype))


class ResBlock(nn.Module):
    """ADM residual block; resample "up" or "down" sits between SiLU and the first convolution and on the skip.

    Shapes: x [b h w c], embedding [b e] -> [b h' w' features]. The second convolution starts at zero, so that a new
    block passes its input on. scale_shift chooses adaptive group norm (scale first, then shift), else the embedding
    is added before the second norm.
    """

    features: int
    groups: int
    epsilon: float
    dtype: Dtype
    scale_shift: bool = True
    dropout: float = 0.0
    resample: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"], key: PRNGKey | None = None
    ) -> Float[Array, "b h2 w2 c2"]:
        """Apply the block; key: draws what is dropped, without it nothing is."""
        h = nn.silu(GroupNorm(self.groups, self.epsilon, self.dtype, name="norm_0")(x))
        match self.resample:
            case "up":
                h, x = upsample(h), upsample(x)
            case "down":
                h, x = downsample(h), downsample(x)
        h = conv(self.features, self.dtype, "conv_0")(h)
        width = 2 * self.features if self.scale_shift else self.features
        modulation = dense(width, self.dtype, "embedding")(nn.silu(embedding))
        norm = GroupNorm(self.groups, self.epsilon, self.dtype, name="norm_1")
        h = norm(h, *jnp.split(modulation, 2, axis=-1)) if self.scale_shift else norm(h + modulation[:, None, None])
        h = nn.Dropout(self.dropout)(nn.silu(h), deterministic=key is None, rng=key)
        h = conv(self.features, self.dtype, "conv_1", zero=True)(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, self.dtype, "skip", side=1)(x)
        return x + h


def visible_first(tokens: Float[Array, "b m d"], mask: Bool[Array, "b m"]) -> Float[Array, "b m d"]:
    """The tokens of each row reordered: those that the mask shows come first, in their order, then the hidden ones."""
    place = jnp.where(mask, jnp.cumsum(mask, axis=1), mask.sum(1, keepdims=True) + jnp.cumsum(~mask, axis=1)) - 1
    # A product with ones and zeros moves tokens exactly, and unlike a gather it is as fast backwards.
    places = jax.nn.one_hot(place, mask.shape[1], dtype=tokens.dtype)
    precision = precision_of("float32" if tokens.dtype == jnp.float32 else "bfloat16")
    return jnp.einsum("bmp,bmd->bpd", places, tokens, precision=precision)


def visible_keys(mask: Bool[Array, "b m"], pixels: int) -> Int[Array, "b 1 1 k"]:
    """1 where a key of [context, pixels] is visible, else 0: context tokens that the mask shows, and all pixels.

    All blocks of a size share it: where each makes its own, the TPU compiler lays them out one after another, and a
    step of many pictures takes it a minute longer.
    """
    return jnp.pad(mask.astype(jnp.int32), ((0, 0), (0, pixels)), constant_values=1)[:, None, None]


class AttentionBlock(nn.Module):
    """Self-attention of pixels that also looks at context tokens: keys and values are [context, pixels].

    Shapes: x [b h w c], context [b m d], visible [b 1 1 m+hw] of `visible_keys` -> [b h w c]. The output projection
    starts at zero. The layout is Karlo's: separate projections, heads of head_channels.
    """

    groups: int
    epsilon: float
    dtype: Dtype
    head_channels: int = 64

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: Float[Array, "b m d"] | None = None,
        visible: Int[Array, "b 1 1 k"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Attend; without `visible` every context token is, as pixels always are."""
        b, h, w, c = x.shape
        heads = c // self.head_channels

        def split(tokens: Array) -> Array:
            return tokens.reshape(b, -1, heads, self.head_channels)

        pixels = GroupNorm(self.groups, self.epsilon, self.dtype, name="norm")(x).reshape(b, h * w, c)
        query = split(dense(c, self.dtype, "query")(pixels))
        key = split(dense(c, self.dtype, "key")(pixels))
        value = split(dense(c, self.dtype, "value")(pixels))
        told, fused = [], flash(query)
        if context is not None:
            if fused and visible is not None:
                context = visible_first(context, visible[:, 0, 0, : context.shape[1]].astype(bool))
            told = [split(dense(c, self.dtype, name)(context)) for name in ("context_key", "context_value")]
        if fused:
            if told:
                key, value = jnp.concatenate([key, told[0]], axis=1), jnp.concatenate([value, told[1]], axis=1)
            lengths = None if visible is None else visible[:, 0, 0].sum(1)
            mixed = attend_flash(query, key, value, lengths)
        else:
            if told:
                key, value = jnp.concatenate([told[0], key], axis=1), jnp.concatenate([told[1], value], axis=1)
            mixed = attend(query, key, value, visible, precision_of(self.dtype))
        out = dense(c, self.dtype, "out", zero=True)(mixed.reshape(b, h * w, c))
        return x + out.reshape(b, h, w, c)
