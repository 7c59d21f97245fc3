"""GLIDE's 1.5B upsampler with text and attention (arXiv 2112.10741, section 4), by the same U-Net."""

from unclip_jax.config import (
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    TransformerConfig,
    UNetConfig,
    UpsamplerConfig,
)


def get_config() -> TrainConfig:
    """64 to 256 px, 384 base channels, text encoder 1024 wide; levels as in the released model."""
    return TrainConfig(
        name="glide_upsampler",
        network=UpsamplerConfig(
            unet=UNetConfig(
                in_channels=6,
                out_channels=6,
                channels=384,
                multipliers=(1, 1, 2, 2, 4, 4),
                depth=2,
                attention_factors=(8, 16, 32),  # 32, 16 and 8 px
                head_channels=64,
                context_dim=1024,
                middle_attention=True,
                dropout=0.1,
                dtype="bfloat16",
            ),
            low_size=64,
            size=256,
            degradation="none",
            crop_fraction=1.0,
            text_encoder=TransformerConfig(1024, 16, 16, dtype="bfloat16"),  # 16 blocks: the released model's
            context_length=128,
        ),
        diffusion=DiffusionConfig(schedule="linear", steps=1000, learned_variance=True),
        sample=SampleConfig(sampler="ddim", steps=27),  # the paper's "fast27" spacing is uneven
        data=DataConfig(size=256, low_size=64, batch_size=512, context_length=128),
        optim=OptimConfig(learning_rate=1e-4, beta2=0.999, weight_decay=0.0, ema=0.9999),
        steps=1_600_000,
    )
