"""CLIP (arXiv 2103.00020): a ViT and a causal text transformer that share an embedding space."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from unclip_jax.config import ClipConfig, TransformerConfig
from unclip_jax.models.precision import dtype_of, precision_of
from unclip_jax.models.transformer import Embed, Transformer
from unclip_jax.sharding import convolution

_SMALL = nn.initializers.normal(0.02)


class TextEncoding(NamedTuple):
    """states: after the final norm, [b n d]. embedding: projected state at the end of text, [b z], not normalised."""

    states: Float[Array, "b n d"]
    embedding: Float[Array, "b z"]


def preprocess(config: ClipConfig, image: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Pixels in [0, 1], shifted and scaled by CLIP's channel statistics."""
    mean, std = np.asarray(config.image_mean, np.float32), np.asarray(config.image_std, np.float32)
    return (image.astype(jnp.float32) / 255 - mean) / std


def normalise(embedding: Float[Array, "b z"]) -> Float[Array, "b z"]:
    """Embeddings at unit length, float32."""
    embedding = embedding.astype(jnp.float32)
    return embedding / jnp.maximum(jnp.linalg.norm(embedding, axis=-1, keepdims=True), 1e-8)


def _norm(config: TransformerConfig) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.norm_epsilon, dtype=dtype_of(config.dtype))


class ImageTower(nn.Module):
    """The image tower alone; parameters are float32, compute is the tower's dtype."""

    config: ClipConfig

    def setup(self) -> None:
        """Creates the tower's parameters."""
        config, vision = self.config, self.config.vision
        dtype, precision = dtype_of(vision.dtype), precision_of(vision.dtype)
        patch = (config.patch_size, config.patch_size)
        places = (config.image_size // config.patch_size) ** 2 + 1
        self.patches = nn.Conv(
            vision.width, patch, patch, "VALID", use_bias=False, dtype=dtype, precision=precision,
            conv_general_dilated=convolution("patches"),
        )  # fmt: skip
        self.class_token = self.param("class_token", _SMALL, (vision.width,))
        self.image_positions = self.param("image_positions", _SMALL, (places, vision.width))
        self.image_norm_in = _norm(vision)
        self.image_transformer = Transformer(vision)
        self.image_norm_out = _norm(vision)
        self.image_projection = nn.Dense(config.embedding_dim, use_bias=False, dtype=dtype, precision=precision)

    def encode_image(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b z"]:
        """Preprocessed pixels of the tower's size to embeddings, not normalised."""
        x = self.patches(pixels)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = jnp.broadcast_to(self.class_token.astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.image_positions.astype(x.dtype)
        x = self.image_transformer(self.image_norm_in(x))
        return self.image_projection(self.image_norm_out(x[:, 0])).astype(jnp.float32)


class TextTower(nn.Module):
    """The text tower alone; parameters are float32, compute is the tower's dtype."""

    config: ClipConfig

    def setup(self) -> None:
        """Creates the tower's parameters."""
        config, text = self.config, self.config.text
        dtype, precision = dtype_of(text.dtype), precision_of(text.dtype)
        self.token_embedding = Embed(config.vocab_size, text.width, dtype=dtype, embedding_init=_SMALL)
        self.text_positions = self.param("text_positions", _SMALL, (config.context_length, text.width))
        self.text_transformer = Transformer(text)
        self.text_norm = _norm(text)
        self.text_projection = nn.Dense(config.embedding_dim, use_bias=False, dtype=dtype, precision=precision)

    def encode_text(self, tokens: Int[Array, "b n"]) -> TextEncoding:
        """Ids to states and embeddings; causality makes a padding mask needless."""
        config = self.config
        x = self.token_embedding(tokens)
        x = x + self.text_positions[: tokens.shape[1]].astype(x.dtype)
        states = self.text_norm(self.text_transformer(x))
        end = tokens if config.eos_id is None else tokens == config.eos_id
        pooled = jnp.take_along_axis(states, jnp.argmax(end, axis=1)[:, None, None], axis=1)[:, 0]
        return TextEncoding(states.astype(jnp.float32), self.text_projection(pooled).astype(jnp.float32))


class Clip(ImageTower, TextTower):
    """Both towers, their parameters side by side in one tree, and the temperature."""

    config: ClipConfig

    def setup(self) -> None:
        """Creates every parameter."""
        ImageTower.setup(self)
        TextTower.setup(self)
        self.log_scale = self.param("log_scale", nn.initializers.constant(np.log(1 / self.config.temperature)), ())

    def scale(self) -> Float[Array, ""]:
        """The factor on cosine similarities, exp of the learned temperature, capped."""
        return jnp.minimum(jnp.exp(self.log_scale), self.config.max_logit_scale)

    def __call__(
        self, pixels: Float[Array, "b h w 3"], tokens: Int[Array, "c n"]
    ) -> tuple[Float[Array, "b z"], TextEncoding, Float[Array, ""]]:
        """Image embeddings, text encodings and the scale of their cosine similarities."""
        return self.encode_image(pixels), self.encode_text(tokens), self.scale()
