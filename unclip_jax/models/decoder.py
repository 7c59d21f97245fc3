"""The unCLIP decoder: a U-Net and what it is told of image and caption (paper section 2.1, Karlo's layout)."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key, Num

from unclip_jax.config import DecoderConfig, TransformerConfig
from unclip_jax.models.precision import dtype_of
from unclip_jax.models.transformer import Embed, Transformer
from unclip_jax.models.unet import UNet
from unclip_jax.models.unet_blocks import dense
from unclip_jax.types import Params


class Condition(NamedTuple):
    """What a U-Net is told, computed once per sample and never per step.

    embedding: [b e], added to the time embedding. context: [b m d], extra attention keys. mask: bool [b m], true
    where a token is visible.
    """

    embedding: Float[Array, "b e"]
    context: Float[Array, "b m d"]
    mask: Bool[Array, "b m"]


class TextEncoder(nn.Module):
    """A decoder's own text encoder (GLIDE, arXiv 2112.10741): tokens, learned positions, transformer, final norm."""

    config: TransformerConfig
    vocab_size: int
    context_length: int

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b n"], mask: Bool[Array, "b n"], *, deterministic: bool = True
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b d"]]:
        """States [b n width] and the state of each row's last visible token [b width]."""
        config = self.config
        normal = nn.initializers.normal(0.02)
        dtype = dtype_of(config.dtype)
        embedded = Embed(self.vocab_size, config.width, dtype=dtype, embedding_init=normal, name="tokens")(tokens)
        positions = self.param("positions", normal, (1, self.context_length, config.width), jnp.float32)
        x = (embedded + positions[:, : tokens.shape[1]]).astype(dtype)
        x = Transformer(config, name="transformer")(x, mask, deterministic=deterministic)
        states = nn.LayerNorm(epsilon=config.norm_epsilon, dtype=dtype, name="norm")(x)
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return states, jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]


class Decoder(nn.Module):
    """Pictures from a CLIP image embedding and a caption.

    Use `condition` once per sample and the call itself once per step, through `module.apply(..., method="condition")`.
    """

    config: DecoderConfig

    def setup(self) -> None:
        """Create the U-Net, Karlo's five projections and, where the config asks, a text encoder and null texts."""
        config, unet = self.config, self.config.unet
        if unet.context_dim is None:
            raise ValueError("a decoder needs unet.context_dim, the width of its text and image tokens")
        self.unet = UNet(unet)
        self.null_image = self.param("null_image", nn.initializers.zeros, (config.image_embedding_dim,), jnp.float32)
        self.image_to_time = dense(unet.embedding_dim, unet.dtype)
        self.image_to_tokens = dense(config.extra_tokens * unet.context_dim, unet.dtype)
        self.text_to_context = dense(unet.context_dim, unet.dtype)
        self.text_norm = nn.LayerNorm(epsilon=1e-5, dtype=dtype_of(unet.dtype))
        if config.text_embedding:
            self.text_to_time = dense(unet.embedding_dim, unet.dtype)
        if config.learned_null_text:
            normal = nn.initializers.normal(0.02)
            self.null_text = self.param("null_text", normal, (config.context_length, unet.context_dim), jnp.float32)
            if config.text_embedding:
                self.null_text_to_time = self.param(
                    "null_text_to_time", nn.initializers.zeros, (unet.embedding_dim,), jnp.float32
                )
        if config.text_encoder is not None:
            self.text_encoder = TextEncoder(config.text_encoder, config.vocab_size, config.context_length)

    def encode_text(
        self, tokens: Int[Array, "b n"], mask: Bool[Array, "b n"], *, deterministic: bool = True
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b d"]]:
        """The own text encoder's states [b n d] and text embedding [b d], which feed `condition`."""
        return self.text_encoder(tokens, mask, deterministic=deterministic)

    def condition(
        self,
        image_embedding: Float[Array, "b z"],
        text_states: Float[Array, "b n d"],
        text_mask: Bool[Array, "b n"],
        text_embedding: Float[Array, "b e"] | None,
        image_keep: Bool[Array, " b"],
        text_keep: Bool[Array, " b"],
    ) -> Condition:
        """Project image embedding z_i and text to time embedding and tokens [extra image tokens | text].

        image_keep false puts the learned null embedding in z_i's place. text_keep false puts learned tokens in the
        text's place (learned_null_text), else hides the text tokens; the text embedding's term goes the same way.
        text_embedding may be None if the config has text_embedding=False. Training and sampling share this method.
        """
        config, unet = self.config, self.config.unet
        image = config.image_scale * jnp.where(image_keep[:, None], image_embedding, self.null_image)
        embedding = self.image_to_time(image)
        if config.text_embedding:
            if text_embedding is None:
                raise ValueError("this decoder's config has text_embedding=True, but no text embedding was given")
            null = self.null_text_to_time if config.learned_null_text else jnp.zeros((), jnp.float32)
            term = self.text_to_time(text_embedding)
            embedding = embedding + jnp.where(text_keep[:, None], term, null.astype(term.dtype))

        # Karlo's order: the projection holds (width, tokens), not (tokens, width).
        extra = self.image_to_tokens(image).reshape(image.shape[0], -1, config.extra_tokens).swapaxes(1, 2)
        text = self.text_norm(self.text_to_context(text_states))
        if config.learned_null_text:
            if text.shape[1] != config.context_length:
                raise ValueError(
                    f"a learned null text has {config.context_length} tokens, the captions have {text.shape[1]}"
                )
            text = jnp.where(text_keep[:, None, None], text, self.null_text.astype(text.dtype))
            visible = text_mask | ~text_keep[:, None]
        else:
            visible = text_mask & text_keep[:, None]
        always = jnp.ones((image.shape[0], config.extra_tokens), bool)
        return Condition(
            embedding.astype(dtype_of(unet.dtype)),
            jnp.concatenate([extra, text], axis=1),
            jnp.concatenate([always, visible], axis=1),
        )

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        condition: Condition,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b h w out"]:
        """The U-Net's raw output for noisy pictures x at timesteps t; float32 [b h w out_channels]."""
        return self.unet(x, t, *condition, deterministic=deterministic)

    def initialise(self) -> Float[Array, "b h w out"]:
        """Touch every parameter with one example of zeros; for `module.init(key, method="initialise")`."""
        config = self.config
        n = config.context_length
        mask, keep = jnp.ones((1, n), bool), jnp.ones((1,), bool)
        if config.text_encoder is None:
            # CLIP puts the text embedding into the space of the image embedding.
            states, embedding = jnp.zeros((1, n, config.text_dim)), jnp.zeros((1, config.image_embedding_dim))
        else:
            states, embedding = self.encode_text(jnp.zeros((1, n), jnp.int32), mask)
        image = jnp.zeros((1, config.image_embedding_dim))
        condition = self.condition(image, states, mask, embedding, keep, keep)
        x = jnp.zeros((1, config.size, config.size, config.unet.in_channels))
        return self(x, jnp.zeros((1,), jnp.int32), condition)


def init_decoder(module: Decoder, key: Key[Array, ""]) -> Params:
    """All of a decoder's parameters, float32; under jit or eval_shape the pass through the network costs nothing."""
    return module.init(key, method="initialise")["params"]


__all__ = ["Condition", "Decoder", "TextEncoder", "init_decoder"]
