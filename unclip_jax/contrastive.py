"""CLIP's symmetric cross entropy over a global batch (arXiv 2103.00020 figure 3), a block of logits at a time.

Every device keeps its pictures; blocks of captions go round a ring of devices, taking along what has been summed over
the pictures that they met. Neither pass stores logits: memory is that of the embeddings of a device's own rows and of
CHUNK rows of logits, and the gradient is the one of the whole matrix.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unclip_jax.sharding import over_rows, shard_number, shards, shift, total

CHUNK = 256  # pictures whose logits exist at once
_MASKED = -1e9


class Sum(NamedTuple):
    """Sum of exp(logit), as its largest logit and the sum of exp(logit - peak)."""

    peak: Float[Array, " b"]
    rest: Float[Array, " b"]


class Guests(NamedTuple):
    """Captions on their way round the ring, and what they carry.

    number: of their rows in the global batch. likely: logit of their own picture, but for rounding. right: that logit,
    once they met it. total: over the pictures met so far. beaten: whether one of those had a larger logit than likely.
    """

    text: Float[Array, "b z"]
    tokens: Int[Array, "b n"]
    number: Int[Array, " b"]
    likely: Float[Array, " b"]
    right: Float[Array, " b"]
    total: Sum
    beaten: Bool[Array, " b"]


@jax.custom_vjp
def contrastive(
    image: Float[Array, "b z"], text: Float[Array, "b z"], scale: Float[Array, ""], tokens: Int[Array, "b n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The loss, and the share of captions whose own picture is the most similar one; float32.

    image, text: embeddings of unit length, pair i in row i. scale: the factor on cosines. tokens: pairs whose captions
    say the same are no negatives of each other. Rows may be split over a mesh (`sharding.on`): the result and its
    gradients are those of one device.
    """
    return _forward(image, text, scale, tokens)[0]


def _forward(
    image: Float[Array, "b z"], text: Float[Array, "b z"], scale: Float[Array, ""], tokens: Int[Array, "b n"]
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    local = over_rows(_local_loss, out=(False, False, True, True))
    loss, hits, by_image, by_text = local(image, text, scale, tokens)
    return (loss, hits), (image, text, scale, tokens, by_image, by_text)


def _backward(saved: tuple[Any, ...], cotangents: tuple[Array, Array]) -> tuple[Array, Array, Array, None]:
    gradient = over_rows(_local_gradient, out=(True, True, False))(*saved)
    of_image, of_text, of_scale = jax.tree.map(lambda x: cotangents[0] * x, gradient)
    return of_image, of_text, of_scale, None


contrastive.defvjp(_forward, _backward)


def _local_loss(image: Array, text: Array, scale: Array, tokens: Array) -> tuple[Array, Array, Sum, Sum]:
    rows, number = len(image), _numbers(image)
    blank = jnp.zeros((rows,))
    nothing = Sum(jnp.full((rows,), -jnp.inf), blank)
    guests = Guests(text, tokens, number, scale * (image * text).sum(-1), blank, nothing, jnp.zeros((rows,), bool))
    mine = _chunked((image, tokens, number, nothing))

    def meet(guests: Guests, chunk: tuple[Any, ...]) -> tuple[Guests, tuple[Any, ...]]:
        own, said, order, met = chunk
        logits = _logits(own, said, order, guests, scale)
        other = order[:, None] != guests.number
        above = (logits > guests.likely) | ((logits == guests.likely) & (order[:, None] < guests.number))
        guests = guests._replace(
            right=guests.right + jnp.where(other, 0.0, logits).sum(axis=0),
            total=_add(guests.total, logits.T),
            beaten=guests.beaten | jnp.any(above & other, axis=0),
        )
        return guests, (own, said, order, _add(met, logits))

    def turn(carry: tuple[Guests, tuple[Any, ...]], _: None):
        guests, mine = jax.lax.scan(meet, *carry)
        return (shift(guests), mine), None

    (home, mine), _ = jax.lax.scan(turn, (guests, mine), None, length=shards())
    by_image, by_text, right = Sum(*(x.reshape(-1) for x in mine[3])), home.total, home.right
    # Peak minus logit first: these are close, and their difference is almost exact.
    of_image, of_text = ((met.peak - right) + jnp.log(met.rest) for met in (by_image, by_text))
    loss, hits = total(((of_image + of_text).sum(), (~home.beaten).sum()))
    count = rows * shards()
    return loss / (2 * count), hits / count, by_image, by_text


def _local_gradient(
    image: Array, text: Array, scale: Array, tokens: Array, by_image: Sum, by_text: Sum
) -> tuple[Array, Array, Array]:
    count, number = len(image) * shards(), _numbers(image)
    blank = jnp.zeros((len(image),))
    guests = Guests(text, tokens, number, blank, blank, by_text, jnp.zeros((len(image),), bool))
    mine = _chunked((image, tokens, number, by_image, jnp.zeros_like(image)))

    def meet(carry: tuple[Guests, Array, Array], chunk: tuple[Any, ...]):
        guests, of_text, of_scale = carry
        own, said, order, met, of_image = chunk
        logits = _logits(own, said, order, guests, scale)
        shares = jnp.exp(logits - met.peak[:, None]) / met.rest[:, None]
        shares = shares + jnp.exp(logits - guests.total.peak) / guests.total.rest
        slope = (shares - 2.0 * (order[:, None] == guests.number)) / (2 * count)
        of_image = of_image + scale * _product("it,tz->iz", slope, guests.text)
        of_text = of_text + scale * _product("it,iz->tz", slope, own)
        # The slope of what is masked is 0.
        of_scale = of_scale + (slope * logits).sum() / scale
        return (guests, of_text, of_scale), (own, said, order, met, of_image)

    def turn(carry: tuple[tuple[Guests, Array, Array], tuple[Any, ...]], _: None):
        (guests, of_text, of_scale), mine = jax.lax.scan(meet, *carry)
        guests, of_text = shift((guests, of_text))
        return ((guests, of_text, of_scale), mine), None

    start = (guests, jnp.zeros_like(text), jnp.zeros(()))
    ((_, of_text, of_scale), mine), _ = jax.lax.scan(turn, (start, mine), None, length=shards())
    return mine[4].reshape(image.shape), of_text, total(of_scale)


def _add(met: Sum, logits: Float[Array, "b other"]) -> Sum:
    peak = jnp.maximum(met.peak, logits.max(axis=1))
    return Sum(peak, met.rest * jnp.exp(met.peak - peak) + jnp.exp(logits - peak[:, None]).sum(axis=1))


def _numbers(image: Array) -> Array:
    return shard_number() * len(image) + jnp.arange(len(image))


def _chunked(columns: tuple[Any, ...]) -> tuple[Any, ...]:
    rows = len(columns[0])
    size = next(size for size in range(min(rows, CHUNK), 0, -1) if rows % size == 0)
    return jax.tree.map(lambda x: x.reshape(rows // size, size, *x.shape[1:]), columns)


def _logits(own: Array, said: Array, order: Array, guests: Guests, scale: Array) -> Float[Array, "i t"]:
    logits = scale * _product("iz,tz->it", own, guests.text)
    same = jnp.all(said[:, None] == guests.tokens, axis=-1)
    return jnp.where(same & (order[:, None] != guests.number), _MASKED, logits)


def _product(terms: str, a: Array, b: Array) -> Array:
    return jnp.einsum(terms, a, b, precision=jax.lax.Precision.HIGHEST)
