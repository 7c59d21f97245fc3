"""Every stage side by side: what each trains, on what loss, and what its previews show.

stage      input -> target                                                     frozen context
CLIP       pictures and captions -> matching embeddings                        -
prior      caption, noised image embedding -> clean image embedding            CLIP, whitening, empty caption
AR prior   caption, first components of an embedding -> bucket of the next     CLIP, quantiser, empty caption
decoder    image embedding, caption, noisy 64 px picture -> clean picture      CLIP
inpainting the same, and the picture around a mask -> clean picture            CLIP
upsamplers small corrupted picture, noisy crop of the large one -> clean crop  -
"""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from unclip_jax.config import (
    ArPriorConfig,
    ClipConfig,
    DecoderConfig,
    DiffusionConfig,
    PriorConfig,
    TrainConfig,
    UpsamplerConfig,
    with_remat,
)
from unclip_jax.contrastive import contrastive
from unclip_jax.diffusion import gaussian, samplers
from unclip_jax.diffusion.guidance import clip_static
from unclip_jax.diffusion.inpainting import keep_known, mask_channels, random_masks
from unclip_jax.diffusion.schedule import make_schedule, step_table, strided_timesteps
from unclip_jax.models.ar_prior import ArPrior
from unclip_jax.models.clip import Clip, ImageTower, normalise, preprocess
from unclip_jax.models.decoder import Condition, Decoder, init_decoder
from unclip_jax.models.prior import Prior, Whitening
from unclip_jax.models.quantiser import Quantiser
from unclip_jax.models.upsampler import Upsampler, init_upsampler, resize_low
from unclip_jax.types import Batch, Denoise, Keys, Params, PRNGKey, Stage

PREVIEW_STEPS = 20
MASKS = 0x3A5  # what a key is folded with to draw an inpainting decoder's masks


def build(config: TrainConfig, clip: ClipConfig | None = None) -> Stage:
    """The stage of a config; `clip` is the config of the frozen CLIP that priors and decoders read.

    Raises ValueError where a prior or decoder is built without one.
    """
    if config.remat is not None:
        config = replace(config, network=with_remat(config.network, config.remat), remat=None)
    match config.network:
        case ClipConfig():
            return clip_stage(config.network)
        case UpsamplerConfig():
            return upsampler_stage(config.network, config.diffusion)
        case _ if clip is None:
            raise ValueError(f"{config.name} trains on a frozen CLIP: name its file with --clip")
        case PriorConfig():
            return prior_stage(config.network, config.diffusion, clip)
        case ArPriorConfig():
            return ar_prior_stage(config.network, clip)
        case DecoderConfig():
            return decoder_stage(config.network, config.diffusion, clip)


def to_model(image: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Bytes to [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def to_pixels(x: Float[Array, "b h w 3"]) -> UInt8[Array, "b h w 3"]:
    """[-1, 1] to bytes, rounded, what lies outside cut."""
    return jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def call(module: nn.Module, params: Params, *arguments: Any, **options: Any) -> Any:
    """A module applied to its parameters."""
    return module.apply({"params": params}, *arguments, **options)


def encode_image(config: ClipConfig, clip: Params, image: UInt8[Array, "b h w 3"]) -> Float[Array, "b z"]:
    """CLIP's image embeddings as other networks see them, pictures resized to its tower's size where they are not."""
    if image.shape[1] != config.image_size:
        image = to_pixels(resize_low(to_model(image), config.image_size))
    embedding = call(ImageTower(config), clip, preprocess(config, image), method="encode_image")
    return normalise(embedding) if config.unit_length else embedding


def clip_stage(config: ClipConfig) -> Stage:
    """Symmetric cross entropy over a batch's similarities (arXiv 2103.00020 figure 3)."""
    clip = Clip(config)

    def init(key: PRNGKey) -> Params:
        side = config.image_size
        return clip.init(key, jnp.zeros((1, side, side, 3)), jnp.zeros((1, config.context_length), jnp.int32))["params"]

    def loss(params: Params, context: Params, batch: Batch, key: PRNGKey):
        image, text, scale = call(clip, params, preprocess(config, batch.image), batch.tokens)
        value, hits = contrastive(normalise(image), normalise(text.embedding), scale, batch.tokens)
        return value, {"top1": hits, "scale": scale}

    return Stage(init, loss)


def _timesteps_and_noise(
    config: DiffusionConfig, key: PRNGKey, x0: Float[Array, "b ..."]
) -> tuple[Array, Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Training timesteps, noise, and x0 noised to them."""
    key_t, key_noise = jax.random.split(key)
    t = gaussian.sample_timesteps(key_t, len(x0), config)
    noise = gaussian.training_noise(key_noise, x0.shape, config.offset)
    return t, noise, gaussian.add_noise(make_schedule(config), x0, noise, t)


def _embedding_of(config: ClipConfig, context: Params, batch: Batch) -> Float[Array, "b z"]:
    """The pictures' embeddings: the stored ones, else the frozen CLIP's."""
    return encode_image(config, context["clip"], batch.image) if batch.embedding is None else batch.embedding


def prior_stage(config: PriorConfig, diffusion: DiffusionConfig, clip_config: ClipConfig) -> Stage:
    """Mean squared error of the whitened image embedding (paper section 2.2), captions dropped for guidance."""
    prior, schedule = Prior(config), make_schedule(diffusion)

    def init(key: PRNGKey) -> Params:
        z, n = jnp.zeros((1, config.embedding_dim)), config.context_length
        states, mask = jnp.zeros((1, n, config.text_dim)), jnp.ones((1, n), bool)
        return prior.init(key, z, jnp.zeros((1,), jnp.int32), states, mask, z)["params"]

    def loss(params: Params, context: Params, batch: Batch, key: PRNGKey):
        key_drop, key_diffusion, key_dropout = jax.random.split(key, 3)
        embedding = _embedding_of(clip_config, context, batch)
        x0 = Whitening(**context["whitening"]).whiten(embedding)
        drop = jax.random.bernoulli(key_drop, config.text_drop, (len(x0), 1))
        tokens = jnp.where(drop, context["empty"]["tokens"], batch.tokens)
        mask = jnp.where(drop, context["empty"]["mask"], batch.mask)
        text = call(Clip(clip_config), context["clip"], tokens, method="encode_text")
        t, noise, x_t = _timesteps_and_noise(diffusion, key_diffusion, x0)
        output = call(prior, params, x_t, t, text.states, mask, text.embedding,
            deterministic=False, rngs={"dropout": key_dropout},
        )  # fmt: skip
        per_example = gaussian.diffusion_loss(diffusion, schedule, output, x0, x_t, noise, t)
        estimate = gaussian.to_x0(schedule, diffusion.prediction, output, x_t, t)
        cosine = (normalise(estimate) * normalise(x0)).sum(-1)
        noisy = t >= 0.9 * diffusion.steps
        return per_example.mean(), {"cosine_noisy": (cosine * noisy).sum() / jnp.maximum(noisy.sum(), 1)}

    return Stage(init, loss)


def ar_prior_stage(config: ArPriorConfig, clip_config: ClipConfig) -> Stage:
    """Cross entropy of the image embedding's tokens (paper section 2.2), captions dropped for guidance."""
    if not config.transformer.causal:
        raise ValueError("an autoregressive prior is causal: set --network.transformer.causal true")
    prior = ArPrior(config)

    def init(key: PRNGKey) -> Params:
        tokens, dot_token = jnp.zeros((1, config.components), jnp.int32), jnp.zeros((1,), jnp.int32)
        z, n = jnp.zeros((1, config.embedding_dim)), config.context_length
        states, mask = jnp.zeros((1, n, config.text_dim)), jnp.ones((1, n), bool)
        return prior.init(key, tokens, dot_token, states, mask, z)["params"]

    def loss(params: Params, context: Params, batch: Batch, key: PRNGKey):
        key_drop, key_dropout = jax.random.split(key)
        embedding, quantiser = _embedding_of(clip_config, context, batch), Quantiser(**context["quantiser"])
        text, empty = (
            call(Clip(clip_config), context["clip"], tokens, method="encode_text")
            for tokens in (batch.tokens, context["empty"]["tokens"])
        )
        tokens = quantiser.encode(embedding)
        # A dropped caption keeps its dot product: guidance shows both of its halves the same token.
        dot_token = quantiser.dot_token(embedding, text.embedding)
        drop = jax.random.bernoulli(key_drop, config.text_drop, (len(tokens), 1))
        states = jnp.where(drop[..., None], empty.states, text.states)
        mask = jnp.where(drop, context["empty"]["mask"], batch.mask)
        logits = call(prior, params, tokens, dot_token, states, mask, jnp.where(drop, empty.embedding, text.embedding),
            deterministic=False, rngs={"dropout": key_dropout},
        )  # fmt: skip
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
        guess = jnp.argmax(logits, axis=-1)
        cosine = (quantiser.decode(guess) * normalise(embedding)).sum(-1)
        return -likelihood.mean(), {"accuracy": (guess == tokens).mean(), "cosine": cosine.mean()}

    return Stage(init, loss)


def decoder_stage(config: DecoderConfig, diffusion: DiffusionConfig, clip_config: ClipConfig) -> Stage:
    """Noise removal given image embedding and caption (paper section 2.1), each dropped at its own rate.

    With 7 input channels also given the picture around a random mask, and the mask: the inpainting decoder (GLIDE).
    """
    if config.unet.in_channels not in (3, 7):
        raise ValueError(f"a decoder reads 3 channels, or 7 where it inpaints, not {config.unet.in_channels}")
    decoder, schedule = Decoder(config), make_schedule(diffusion)
    inpaints = config.unet.in_channels == 7

    def init(key: PRNGKey) -> Params:
        return init_decoder(decoder, key)

    def condition(params: Params, context: Params, batch: Batch, keep_image: Array, keep_text: Array) -> Condition:
        embedding = _embedding_of(clip_config, context, batch)
        tokens, mask = batch.tokens, batch.mask
        if config.empty_null_text:
            tokens = jnp.where(keep_text[:, None], tokens, context["empty"]["tokens"])
            mask, keep_text = jnp.where(keep_text[:, None], mask, context["empty"]["mask"]), jnp.ones_like(keep_text)
        if config.text_encoder is None:
            states, pooled = call(Clip(clip_config), context["clip"], tokens, method="encode_text")
        else:
            states, pooled = call(decoder, params, tokens, mask, method="encode_text")
        return call(decoder, params, embedding, states, mask, pooled, keep_image, keep_text, method="condition")

    def loss(params: Params, context: Params, batch: Batch, key: PRNGKey):
        key_image, key_text, key_diffusion, key_dropout = jax.random.split(key, 4)
        rows = (len(batch.image),)
        keep_image = ~jax.random.bernoulli(key_image, config.image_drop, rows)
        keep_text = ~jax.random.bernoulli(key_text, config.text_drop, rows)
        told = condition(params, context, batch, keep_image, keep_text)
        x0 = to_model(batch.image)
        t, noise, x_t = _timesteps_and_noise(diffusion, key_diffusion, x0)
        x = x_t
        if inpaints:
            masks = random_masks(jax.random.fold_in(key, MASKS), *rows, config.size)
            x = jnp.concatenate([x_t, mask_channels(x0, masks)], axis=-1)
        output = call(decoder, params, x, t, told, deterministic=False, rngs={"dropout": key_dropout})
        per_example = gaussian.diffusion_loss(diffusion, schedule, output, x0, x_t, noise, t)
        # Where almost nothing is left of the picture, only the conditions can lower the loss.
        noisy = t >= 0.9 * diffusion.steps
        return per_example.mean(), {"loss_noisy": (per_example * noisy).sum() / jnp.maximum(noisy.sum(), 1)}

    def preview(params: Params, context: Params, batch: Batch, keys: Keys) -> UInt8[Array, "b h w 3"]:
        keep = jnp.ones((len(batch.image),), bool)
        told = condition(params, context, batch, keep, keep)
        if not inpaints:
            denoise = gaussian.denoiser(diffusion, schedule, lambda x, t: call(decoder, params, x, t, told))
            return _preview(diffusion, denoise, keys, batch.image.shape[1:])
        x0, masks = to_model(batch.image), random_masks(jax.random.fold_in(keys[0], MASKS), len(keep), config.size)
        beside = mask_channels(x0, masks)

        def apply(x: Array, t: Array) -> Array:
            return call(decoder, params, jnp.concatenate([x, beside], axis=-1), t, told)

        denoise, step = gaussian.denoiser(diffusion, schedule, apply), samplers.ddim(schedule)
        painted = _preview(diffusion, denoise, keys, x0.shape[1:], keep_known(step, schedule, x0, masks[..., None]))
        return jnp.concatenate([to_pixels(beside[..., :3]), painted], axis=2)

    return Stage(init, loss, preview)


def upsampler_stage(config: UpsamplerConfig, diffusion: DiffusionConfig) -> Stage:
    """Noise removal given a smaller, corrupted picture, on crops (paper section 2.1)."""
    if config.residual and (diffusion.prediction != "x0" or diffusion.learned_variance):
        raise ValueError("a residual upsampler predicts x0 alone: set diffusion.prediction to x0, without variances")
    upsampler, schedule = Upsampler(config), make_schedule(diffusion)

    def init(key: PRNGKey) -> Params:
        return init_upsampler(upsampler, key)

    def resized(batch: Batch) -> Float[Array, "b h w 3"]:
        if batch.low is None:
            raise ValueError("upsamplers train on pairs: set data.low_size to the side of the small picture")
        return resize_low(to_model(batch.low), batch.image.shape[1])

    def loss(params: Params, context: Params, batch: Batch, key: PRNGKey):
        if config.last_step:
            raise ValueError("the U-Net of the last step is trained by itself: set network.last_step to false")
        key_diffusion, key_dropout = jax.random.split(key)
        x0, low = to_model(batch.image), resized(batch)
        t, noise, x_t = _timesteps_and_noise(diffusion, key_diffusion, x0)
        output = call(upsampler, params, x_t, t, low, deterministic=False, rngs={"dropout": key_dropout})
        per_example = gaussian.diffusion_loss(diffusion, schedule, output, x0, x_t, noise, t)
        return per_example.mean(), {}

    def preview(params: Params, context: Params, batch: Batch, keys: Keys) -> UInt8[Array, "b h w 3"]:
        low = resized(batch)
        denoise = gaussian.denoiser(diffusion, schedule, lambda x, t: call(upsampler, params, x, t, low))
        return jnp.concatenate([to_pixels(low), _preview(diffusion, denoise, keys, batch.image.shape[1:])], axis=2)

    return Stage(init, loss, preview)


def _preview(
    config: DiffusionConfig, denoise: Denoise, keys: Keys, shape: tuple[int, ...], step: samplers.Step | None = None
) -> UInt8[Array, "b h w 3"]:
    """A few steps from noise, deterministic DDIM's by default, unguided."""
    schedule = make_schedule(config)
    table = step_table(strided_timesteps(PREVIEW_STEPS, config.steps))
    if config.clip is not None:
        denoise = clip_static(denoise, config.clip)
    noise = samplers.initial_noise(keys, shape)
    return to_pixels(samplers.run(step or samplers.ddim(schedule), denoise, keys, noise, table))
