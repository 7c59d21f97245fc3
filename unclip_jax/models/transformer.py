"""Pre-norm transformer blocks: CLIP's towers, both priors and the decoder's text encoder are made of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unclip_jax.config import TransformerConfig
from unclip_jax.models.precision import dtype_of, precision_of

_MASKED = -1e9


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """OpenAI CLIP's approximation of GELU: x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def attend(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Bool[Array, "b #h #q k"] | None,
    precision: jax.lax.Precision | None,
) -> Float[Array, "b q h d"]:
    """Scaled dot-product attention, softmax in float32; where mask is false a key is invisible."""
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, precision=precision).astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, _MASKED)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision=precision)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b 1 #n n"] | None, deterministic: bool = True
    ) -> Float[Array, "b n d"]:
        """One block; mask is true where a query (axis 2) may see a key (axis 3)."""
        config = self.config
        dtype, precision = dtype_of(config.dtype), precision_of(config.dtype)
        head_dim = config.head_dim or config.width // config.heads

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=config.norm_epsilon, dtype=dtype, name=name)

        def heads(name: str) -> nn.DenseGeneral:
            return nn.DenseGeneral((config.heads, head_dim), dtype=dtype, precision=precision, name=name)

        h = norm("norm_attention")(x)
        h = attend(heads("query")(h), heads("key")(h), heads("value")(h), mask, precision)
        h = nn.DenseGeneral(config.width, axis=(-2, -1), dtype=dtype, precision=precision, name="project")(h)
        x = x + nn.Dropout(config.dropout)(h, deterministic=deterministic)

        h = norm("norm_mlp")(x)
        hidden = int(config.width * config.mlp_ratio)
        h = nn.Dense(hidden, dtype=dtype, precision=precision, name="mlp_in")(h)
        h = quick_gelu(h) if config.activation == "quick_gelu" else jax.nn.gelu(h, approximate=False)
        h = nn.Dense(config.width, dtype=dtype, precision=precision, name="mlp_out")(h)
        return x + nn.Dropout(config.dropout)(h, deterministic=deterministic)


class Transformer(nn.Module):
    """A stack of blocks, without a final norm."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None, deterministic: bool = True
    ) -> Float[Array, "b n d"]:
        """Blocks in turn; mask [b n] is false on keys that nobody may see, causality comes from the config."""
        visible = None if mask is None else mask[:, None, None, :]
        if self.config.causal:
            causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None, None]
            # With a padding mask a row could see nothing at all only if its first token were padding.
            visible = jnp.broadcast_to(causal, (x.shape[0], *causal.shape[1:])) if visible is None else visible & causal
        x = x.astype(dtype_of(self.config.dtype))
        for layer in range(self.config.layers):
            x = Block(self.config, name=f"block_{layer}")(x, visible, deterministic)
        return x
