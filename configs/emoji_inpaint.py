"""64 px inpainting decoder on emoji scenes: the shipped decoder with mask channels, fine-tuned (GLIDE's way)."""

from dataclasses import replace

from unclip_jax.config import DecoderConfig, OptimConfig, TrainConfig
from unclip_jax.overrides import load_config


def get_config() -> TrainConfig:
    """Four more input channels, masked picture and mask; to be trained with --init-from decoder.safetensors."""
    plain = load_config("emoji_decoder")
    assert isinstance(plain.network, DecoderConfig)
    return replace(
        plain,
        name="emoji_inpaint",
        network=replace(plain.network, unet=replace(plain.network.unet, in_channels=7)),
        optim=OptimConfig(learning_rate=3e-4, warmup=100, decay_steps=4000, ema=0.998),
        steps=4000,
    )
