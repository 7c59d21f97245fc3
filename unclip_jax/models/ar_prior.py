"""The autoregressive prior (paper section 2.2): a causal transformer over the buckets of the CLIP image embedding."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unclip_jax.config import ArPriorConfig
from unclip_jax.models.precision import dtype_of, precision_of
from unclip_jax.models.transformer import Embed, Memory, Transformer, empty_memory
from unclip_jax.models.unet_blocks import timestep_embedding


def smooth(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Float[Array, "n d"]:
    """A table that starts with neighbouring tokens alike, since their buckets mean nearly the same."""
    return 0.03 * timestep_embedding(jnp.arange(shape[0]), shape[1]).astype(dtype)


class ArPrior(nn.Module):
    """Sequence: text states, text embedding, token of z_i . z_t, tokens of z_i; every place tells the token after it.

    The paper gives the latent decoder's text path no further than this; here the states come in by one projection.
    """

    config: ArPriorConfig

    def setup(self) -> None:
        """Creates every parameter."""
        config, transformer = self.config, self.config.transformer
        dtype, precision = dtype_of(transformer.dtype), precision_of(transformer.dtype)
        self.states_in = nn.Dense(transformer.width, dtype=dtype, precision=precision)
        self.text_in = nn.Dense(transformer.width, dtype=dtype, precision=precision)
        # Tokens of z_i come first, those of the dot product after them.
        rows = config.buckets + config.dot_buckets
        self.token_embedding = Embed(rows, transformer.width, dtype=dtype, embedding_init=smooth)
        places = config.context_length + 1 + config.components
        self.positions = self.param("positions", nn.initializers.normal(0.02), (places, transformer.width))
        self.transformer = Transformer(transformer)
        self.norm = nn.LayerNorm(epsilon=transformer.norm_epsilon, dtype=dtype)

    def __call__(
        self,
        tokens: Int[Array, "b k"],
        dot_token: Int[Array, " b"],
        text_states: Float[Array, "b n d"],
        text_mask: Bool[Array, "b n"],
        text_embedding: Float[Array, "b z"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b k v"]:
        """Logits of every token given the tokens before it, float32.

        tokens: buckets of the image embedding. dot_token: bucket of z_i . z_t. text_states, text_mask: CLIP's last
        states and their padding mask. text_embedding: as CLIP's text tower projects it, not normalised.
        """
        ids = jnp.concatenate([self.config.buckets + dot_token[:, None], tokens[:, :-1]], axis=1)
        h = jnp.concatenate([self._prefix(text_states, text_embedding), self.token_embedding(ids)], axis=1)
        h = h + self.positions.astype(h.dtype)
        return self._logits(self.transformer(h, self._mask(text_mask), deterministic)[:, -tokens.shape[1] :])

    def begin(
        self, text_states: Float[Array, "b n d"], text_mask: Bool[Array, "b n"], text_embedding: Float[Array, "b z"]
    ) -> tuple[Memory, ...]:
        """The memory of a caption, with room for all tokens."""
        h = self._prefix(text_states, text_embedding)
        h = h + self.positions[: h.shape[1]].astype(h.dtype)
        memory = empty_memory(self.config.transformer, h.shape[0], len(self.positions))
        return self.transformer.extend(h, memory, 0, self._mask(text_mask))[1]

    def step(
        self, last: Int[Array, " b"], number: Int[Array, ""], text_mask: Bool[Array, "b n"], memory: tuple[Memory, ...]
    ) -> tuple[Float[Array, "b v"], tuple[Memory, ...]]:
        """Logits of token `number` and the memory that they leave; last: the token before it, number 0: dot_token."""
        ids = jnp.where(number == 0, self.config.buckets + last, last)
        place = self.config.context_length + 1 + number
        h = self.token_embedding(ids)[:, None]
        h = h + self.positions[place].astype(h.dtype)
        h, memory = self.transformer.extend(h, memory, place, self._mask(text_mask))
        return self._logits(h)[:, 0], memory

    def _prefix(self, text_states: Float[Array, "b n d"], text_embedding: Float[Array, "b z"]) -> Float[Array, "b m w"]:
        return jnp.concatenate([self.states_in(text_states), self.text_in(text_embedding)[:, None]], axis=1)

    def _mask(self, text_mask: Bool[Array, "b n"]) -> Bool[Array, "b m"]:
        rest = jnp.ones((len(text_mask), 1 + self.config.components), bool)
        return jnp.concatenate([text_mask, rest], axis=1)

    def _logits(self, h: Float[Array, "b q d"]) -> Float[Array, "b q v"]:
        table = self.token_embedding.embedding[: self.config.buckets].astype(h.dtype)
        precision: jax.lax.Precision | None = precision_of(self.config.transformer.dtype)
        return jnp.einsum("bqd,vd->bqv", self.norm(h), table, precision=precision).astype(jnp.float32)
