"""Attention on TPUs as one Pallas kernel each way, without logits in HBM (arXiv 2205.14135, section 3.1).

A picture has few enough keys that a chip's own memory holds them all: softmax sees whole rows, and the way back
computes them again from queries and keys alone. Heads of 64 channels lie two to a register of 128 lanes, as the
projections write them, so nothing is transposed or padded: zeros in the other head's lanes keep the two apart.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from unclip_jax.sharding import over_heads, platform

LANES = 128
SCOPE = "products_"  # and how many FLOPs one product of all queries and keys has: of a kernel jax sees a step alone
MASKED = -1e9
_FROM = 64  # queries: below, logits in HBM cost little
_MOST = 2048  # queries or keys: more do not fit into the 16 MiB that a kernel has, beside their logits
_ROWS = 256  # queries whose logits are there at once

Mask = Bool[Array, "b #h #q k"] | Int[Array, "b #h #q k"]  # where it is true, or not 0, a key is visible


def suits(query: Float[Array, "b q h d"], key: Float[Array, "b k h d"], mask: Mask | None) -> bool:
    """Whether `attend_blocks` can take these: bfloat16 on a TPU, neither few nor very many, a mask of keys alone."""
    of_keys = mask is None or mask.shape[1:3] == (1, 1)
    fits = _FROM <= query.shape[1] <= _MOST and key.shape[1] <= _MOST
    return platform() == "tpu" and query.dtype == jnp.bfloat16 and of_keys and fits


def attend_blocks(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Bool[Array, "b 1 1 k"] | Int[Array, "b 1 1 k"] | None,
    causal: bool = False,
) -> Float[Array, "b q h d"]:
    """Scaled dot-product attention, softmax in float32; rows and heads stay on their devices of the mesh.

    mask: true, or not 0, where a key is visible. In int32 it is what the kernel reads.
    causal: no query sees a key behind its own place, of which there are as many.
    """
    heads, channels = query.shape[2:]
    b, k = key.shape[:2]
    visible = jnp.ones((b, 1, 1, k), jnp.int32) if mask is None else mask.astype(jnp.int32)
    flat = (x.reshape(*x.shape[:2], -1) for x in (query * channels**-0.5, key, value))
    attend = functools.partial(_attend, channels=channels, causal=causal)
    mixed: Array = over_heads(attend, heads, causal)(*flat, visible)
    return mixed.reshape(query.shape)


def _attend(query: Array, key: Array, value: Array, visible: Array, channels: int, causal: bool) -> Array:
    """[b q hd], [b k hd], [b k hd], [b 1 1 k] -> [b q hd]."""
    shape, flops = query.shape, 2 * math.prod(query.shape) * key.shape[1]
    heads, filled = shape[2] // channels, channels if LANES % channels == 0 else -(-channels // LANES) * LANES
    more = -heads % max(1, LANES // filled)
    fills = more or filled > channels  # what does not fill lanes is filled up with zeros
    if fills:
        room = (0, 0), (0, 0), (0, more), (0, filled - channels)
        apart = (x.reshape(*x.shape[:2], heads, channels) for x in (query, key, value))
        query, key, value = (jnp.pad(x, room).reshape(*x.shape[:2], -1) for x in apart)
    with jax.named_scope(f"{SCOPE}{flops}"):
        mixed: Any = _attention(query, key, value, visible, filled, causal)
    return mixed.reshape(*shape[:2], -1, filled)[:, :, :heads, :channels].reshape(shape) if fills else mixed


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(query: Array, key: Array, value: Array, visible: Array, channels: int, causal: bool) -> Array:
    """[b q hd], [b k hd], [b k hd], [b 1 1 k] -> [b q hd]."""
    return _call(_forward, (query, key, value, visible), (query,), channels, causal)[0]


def _keep(query: Array, key: Array, value: Array, visible: Array, channels: int, causal: bool) -> tuple[Array, Any]:
    return _attention(query, key, value, visible, channels, causal), (query, key, value, visible)


def _back(channels: int, causal: bool, kept: Any, gradient: Array) -> tuple[Array | None, ...]:
    query, key, value, _ = kept
    return *_call(_backward, (*kept, gradient), (query, key, value), channels, causal), None


_attention.defvjp(_keep, _back)


def _call(
    kernel: Any, inputs: Sequence[Array], outputs: Sequence[Array], channels: int, causal: bool
) -> Sequence[Array]:
    """A kernel run over rows of the batch and groups of heads that fill the lanes; its results are like `outputs`."""
    from jax.experimental.pallas import tpu as pltpu

    lanes = max(LANES, channels)

    def block(x: Array) -> pl.BlockSpec:
        if x.dtype == jnp.int32:  # what is visible, of all heads
            return pl.BlockSpec((1, *x.shape[1:]), lambda row, group: (row, 0, 0, 0))
        return pl.BlockSpec((1, x.shape[1], lanes), lambda row, group: (row, 0, group))

    parameters: Any = getattr(pltpu, "CompilerParams", None) or getattr(pltpu, "TPUCompilerParams")  # noqa: B009
    sums = [pltpu.VMEM((x.shape[1], lanes), jnp.float32) for x in outputs[1:]]
    return pl.pallas_call(
        functools.partial(kernel, channels=channels, causal=causal),
        grid=(inputs[0].shape[0], inputs[0].shape[2] // lanes),
        in_specs=[block(x) for x in inputs],
        out_specs=[block(x) for x in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        scratch_shapes=sums,
        compiler_params=parameters(dimension_semantics=("parallel", "parallel")),
    )(*inputs)


def _forward(query: Any, key: Any, value: Any, visible: Any, out: Any, *, channels: int, causal: bool) -> None:
    for rows, keys in _parts(query.shape[1], key.shape[1], causal):
        k, v, mixed = key[0, keys], value[0, keys], jnp.zeros((), jnp.float32)
        for own in _heads(channels):
            weights, total = _softmax(query[0, rows] * own, k, visible[0, 0, :, keys], rows, causal)
            mixed += own * _product(weights.astype(v.dtype), v, 1, 0) / total
        out[0, rows] = mixed.astype(out.dtype)


def _backward(
    query: Any, key: Any, value: Any, visible: Any, gradient: Any, d_query: Any, d_key: Any, d_value: Any,
    sum_key: Any, sum_value: Any, *, channels: int, causal: bool,
) -> None:  # fmt: skip
    sum_key[...] = sum_value[...] = jnp.zeros(sum_key.shape, jnp.float32)
    for rows, keys in _parts(query.shape[1], key.shape[1], causal):
        k, v, mixed = key[0, keys], value[0, keys], jnp.zeros((), jnp.float32)
        for own in _heads(channels):
            q, g = query[0, rows] * own, gradient[0, rows] * own
            weights, total = _softmax(q, k, visible[0, 0, :, keys], rows, causal)
            weights /= total
            d_weights = _product(g, v, 1, 1)
            d_logits = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True))
            d_logits = d_logits.astype(k.dtype)
            mixed += own * _product(d_logits, k, 1, 0)
            sum_key[keys] += _product(d_logits, q, 0, 0)
            sum_value[keys] += _product(weights.astype(g.dtype), g, 0, 0)
        d_query[0, rows] = mixed.astype(d_query.dtype)
    d_key[0], d_value[0] = sum_key[...].astype(d_key.dtype), sum_value[...].astype(d_value.dtype)


def _parts(queries: int, keys: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Queries of one part, and the keys that they may see."""
    for start in range(0, queries, _ROWS):
        stop = min(start + _ROWS, queries)
        yield slice(start, stop), slice(0, stop if causal else keys)


def _heads(channels: int) -> Iterator[Array]:
    """For every head of a group 1 in its own lanes and 0 in the others'."""
    lanes = max(LANES, channels)
    head = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1) // channels
    for own in range(lanes // channels):
        yield (head == own).astype(jnp.bfloat16)


def _softmax(query: Array, key: Array, visible: Array, rows: slice, causal: bool) -> tuple[Array, Array]:
    """Weights [q k] in float32 and their sums [q 1]."""
    logits = _product(query, key, 1, 1)
    seen = visible != 0
    if causal:
        place = rows.start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        seen = seen & (jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) <= place)
    logits = jnp.where(seen, logits, MASKED)
    weights = jnp.exp(logits - logits.max(1, keepdims=True))
    return weights, weights.sum(1, keepdims=True)


def _product(left: Array, right: Array, over_left: int, over_right: int) -> Array:
    """The product over one axis of each, in float32."""
    axes = (((over_left,), (over_right,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
