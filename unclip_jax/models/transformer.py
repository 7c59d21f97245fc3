"""Pre-norm transformer blocks: CLIP's towers, both priors and the decoder's text encoder are made of them."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float, Int

from unclip_jax.config import TransformerConfig
from unclip_jax.models.flash import MASKED, Mask, attend_blocks, suits
from unclip_jax.models.precision import dtype_of, precision_of
from unclip_jax.models.remat import remembering
from unclip_jax.sharding import as_leaf, lookup, rows

_FLASH_FROM = 256  # queries


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """OpenAI CLIP's approximation of GELU: x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU, x Phi(x), by erf in float32: jax.nn.gelu's erfc takes TPUs twice as long."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def attend(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Mask | None,
    precision: jax.lax.Precision | None,
    causal: bool = False,
) -> Float[Array, "b q h d"]:
    """Scaled dot-product attention, softmax in float32; where mask is false, or 0, a key is invisible.

    causal: so is a key behind the query's own place, of which there are as many.
    """
    if suits(query, key, mask):
        return attend_blocks(query, key, value, mask, causal)
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, precision=precision).astype(jnp.float32)
    seen = None if mask is None else mask.astype(bool)
    if causal:
        ordered = jnp.tril(jnp.ones(logits.shape[2:], bool))
        seen = ordered if seen is None else seen & ordered
    if seen is not None:
        logits = jnp.where(seen, logits, MASKED)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision=precision)


def flash(query: Float[Array, "b q h d"]) -> bool:
    """Whether these queries are for `attend_flash`; the package's one choice by platform.

    Half precision on NVIDIA GPUs of compute capability 8 or more, and so many queries that logits in memory would
    cost more than what computes them.
    """
    if jax.default_backend() != "gpu" or query.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    device: Any = jax.devices()[0]
    capable = re.fullmatch(r"([89]|1\d)\.\d", str(device.compute_capability)) is not None
    return capable and query.shape[1] >= _FLASH_FROM and query.shape[3] in (32, 64, 128)


def attend_flash(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    lengths: Int[Array, " b"] | None,
) -> Float[Array, "b q h d"]:
    """`attend` as cuDNN's one kernel, which keeps no logits in memory; the first `lengths` keys are visible."""
    try:
        return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation="cudnn")
    except (NotImplementedError, RuntimeError):  # shapes that cuDNN does not take, or no cuDNN
        return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation="xla")


class Memory(NamedTuple):
    """Keys and values of one block, or of all l that are scanned, so that later tokens need not compute them again."""

    key: Float[Array, "*l b n h d"]
    value: Float[Array, "*l b n h d"]


def empty_memory(config: TransformerConfig, batch: int, length: int) -> tuple[Memory, ...]:
    """Room for the keys and values of `length` tokens in every block, in the compute dtype; one of all if scanned."""
    shape = (batch, length, config.heads, config.head_dim or config.width // config.heads)
    if config.scan:
        blank = jnp.zeros((config.layers, *shape), dtype_of(config.dtype))
        return (Memory(blank, blank),)
    blank = jnp.zeros(shape, dtype_of(config.dtype))
    return (Memory(blank, blank),) * config.layers


class Projection(nn.Module):
    """nn.DenseGeneral over the last `axes` axes, computed as if heads and channels were one: TPUs like it."""

    features: tuple[int, ...]
    axes: int
    dtype: jnp.dtype
    precision: jax.lax.Precision | None

    @nn.compact
    def __call__(self, x: Float[Array, "b n ..."]) -> Float[Array, "b n ..."]:
        """The product with `kernel` [*x.shape[-axes:], *features], and `bias` [*features]."""
        lead, given = x.shape[: -self.axes], x.shape[-self.axes :]
        flat = math.prod(given), math.prod(self.features)

        def begin(key: Array, shape: tuple[int, ...]) -> Array:
            return nn.initializers.lecun_normal()(key, flat).reshape(shape)

        kernel = self.param("kernel", begin, (*given, *self.features))
        bias = self.param("bias", nn.initializers.zeros, self.features)
        kernel = as_leaf(kernel.reshape(flat), f"{self.name}/kernel", kernel.shape, self.axes)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.dot(x.reshape(*lead, flat[0]), kernel, precision=self.precision) + bias.reshape(-1)
        return y.reshape(*lead, *self.features)


class Embed(nn.Module):
    """nn.Embed, which on a mesh exchanges rows instead of gathering its table."""

    num_embeddings: int
    features: int
    embedding_init: Callable[..., Array]
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self) -> None:
        """Creates the table."""
        self.embedding = self.param("embedding", self.embedding_init, (self.num_embeddings, self.features))

    def __call__(self, ids: Int[Array, "b ..."]) -> Float[Array, "b ... d"]:
        """The rows of the table with these numbers."""
        return lookup(str(self.name), self.dtype)(self.embedding, ids)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "b 1 #n m"] | None,
        deterministic: bool = True,
        memory: Memory | None = None,
        place: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "b n d"], Memory]:
        """One block, and the keys and values that it attended to.

        mask: true where a query (axis 2) may see a key (axis 3). memory: earlier tokens' keys and values, among which
        x's own are written from `place` on, of which mask says what comes later; None: x sees itself alone.
        """
        config = self.config
        dtype, precision = dtype_of(config.dtype), precision_of(config.dtype)
        head_dim = config.head_dim or config.width // config.heads

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=config.norm_epsilon, dtype=dtype, name=name)

        def heads(name: str) -> Projection:
            return Projection((config.heads, head_dim), 1, dtype, precision, name=name)

        h = norm("norm_attention")(x)
        query, own = heads("query")(h), Memory(heads("key")(h), heads("value")(h))
        if memory is None:
            memory = own
        else:
            memory = Memory(
                *(jax.lax.dynamic_update_slice_in_dim(m, o, place, 1) for m, o in zip(memory, own, strict=True))
            )
        h = attend(query, *memory, mask, precision, causal=config.causal and memory is own)
        h = Projection((config.width,), 2, dtype, precision, name="project")(h)
        x = x + nn.Dropout(config.dropout)(h, deterministic=deterministic)

        h = norm("norm_mlp")(x)
        hidden = int(config.width * config.mlp_ratio)
        h = nn.Dense(hidden, dtype=dtype, precision=precision, name="mlp_in")(h)
        h = quick_gelu(h) if config.activation == "quick_gelu" else gelu(h)
        h = nn.Dense(config.width, dtype=dtype, precision=precision, name="mlp_out")(h)
        return x + nn.Dropout(config.dropout)(h, deterministic=deterministic), memory


class Transformer(nn.Module):
    """A stack of blocks, without a final norm."""

    config: TransformerConfig

    def setup(self) -> None:
        """Creates the blocks, block_0 and so on, or the one of all layers, block."""
        layers = self.config.layers
        self.block = Block(self.config) if self.config.scan else [Block(self.config) for _ in range(layers)]

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None, deterministic: bool = True
    ) -> Float[Array, "b n d"]:
        """Blocks in turn; mask [b n] is false on keys that nobody may see, causality comes from the config."""
        # Causal, with a padding mask, a row could see nothing at all only if its first token were padding.
        visible = None if mask is None else mask[:, None, None, :]
        x = x.astype(dtype_of(self.config.dtype))

        def call(block: Block, x: Array, visible: Array | None) -> Array:
            return block(x, visible, deterministic)[0]

        call = remembering(self.config.remat, call, looped=self.config.scan)
        if isinstance(self.block, Block):
            every = self._scan(lambda block, x, visible: (rows(call(block, x, visible)), None), nn.broadcast)
            return every(self.block, rows(x), visible)[0]
        for block in self.block:
            x = rows(call(block, rows(x), visible))
        return x

    def extend(
        self,
        x: Float[Array, "b n d"],
        memory: tuple[Memory, ...],
        place: Int[Array, ""] | int,
        mask: Bool[Array, "b m"],
    ) -> tuple[Float[Array, "b n d"], tuple[Memory, ...]]:
        """States of the n tokens from `place` on in a causal sequence of at most m, whose earlier ones `memory` holds.

        memory: of every block, as empty_memory or an earlier call gave it. mask: false on keys that nobody may see.
        Together with its new memory it equals what __call__ gives for the whole sequence.
        """
        causal = jnp.arange(mask.shape[1]) <= place + jnp.arange(x.shape[1])[:, None]
        visible = mask[:, None, None, :] & causal
        x = x.astype(dtype_of(self.config.dtype))
        if isinstance(self.block, Block):
            every = self._scan(lambda block, x, old: block(x, visible, True, old, place), 0)
            x, new = every(self.block, x, memory[0])
            return x, (new,)
        extended = []
        for block, old in zip(self.block, memory, strict=True):
            x, new = block(x, visible, True, old, place)
            extended.append(new)
        return x, tuple(extended)

    def _scan(self, function: Any, inputs: Any) -> Any:
        """function(block, x, input) -> (x, output) over all layers; inputs: 0 where each has its own, or broadcast."""
        rngs: Any = {"params": True, "dropout": True}
        return nn.scan(function, {"params": 0}, split_rngs=rngs, in_axes=inputs, length=self.config.layers)
