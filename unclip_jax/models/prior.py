"""The diffusion prior (paper section 2.2): a causal transformer that predicts the clean CLIP image embedding."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unclip_jax.config import PriorConfig
from unclip_jax.models.precision import dtype_of, precision_of
from unclip_jax.models.transformer import Transformer
from unclip_jax.models.unet_blocks import timestep_embedding


class Whitening(NamedTuple):
    """Statistics of CLIP's image embeddings: constants beside the parameters, never trained. mean, std: [z]."""

    mean: Float[Array, " z"]
    std: Float[Array, " z"]

    def whiten(self, embedding: Float[Array, "b z"]) -> Float[Array, "b z"]:
        """Embeddings as the prior sees them: about unit variance per coordinate."""
        return (embedding - self.mean) / self.std

    def restore(self, white: Float[Array, "b z"]) -> Float[Array, "b z"]:
        """The inverse of whiten."""
        return white * self.std + self.mean


class Prior(nn.Module):
    """Sequence: text states, text embedding, timestep, noised image embedding, query; the query's output is x0."""

    config: PriorConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b z"],
        t: Int[Array, " b"],
        text_states: Float[Array, "b n d"],
        text_mask: Bool[Array, "b n"],
        text_embedding: Float[Array, "b z"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b z"]:
        """The clean whitened embedding, float32.

        x: noised whitened embeddings. t: timesteps. text_states, text_mask: CLIP's last states and their padding mask.
        text_embedding: as CLIP's text tower projects it, not normalised.
        """
        config = self.config
        width = config.transformer.width
        dtype, precision = dtype_of(config.transformer.dtype), precision_of(config.transformer.dtype)

        def dense(name: str, features: int = width) -> nn.Dense:
            return nn.Dense(features, dtype=dtype, precision=precision, name=name)

        time = timestep_embedding(t, width)
        time = dense("time_1")(nn.silu(dense("time_0")(time)))
        query = self.param("query", nn.initializers.normal(0.02), (1, width))
        single = [dense("text_in")(text_embedding), time, dense("image_in")(x)]
        tokens = [dense("states_in")(text_states), *(token[:, None] for token in single)]
        tokens.append(jnp.broadcast_to(query.astype(dtype), (x.shape[0], 1, width)))
        h = jnp.concatenate(tokens, axis=1)
        positions = self.param("positions", nn.initializers.normal(0.02), (config.context_length + 4, width))
        h = h + positions.astype(dtype)
        mask = jnp.concatenate([text_mask, jnp.ones((x.shape[0], 4), bool)], axis=1)
        h = Transformer(config.transformer, name="transformer")(h, mask, deterministic)
        h = nn.LayerNorm(epsilon=config.transformer.norm_epsilon, dtype=dtype, name="norm")(h[:, -1])
        return dense("out", config.embedding_dim)(h).astype(jnp.float32)
