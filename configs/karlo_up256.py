"""Karlo v1 alpha's 64 to 256 px upsampler for every step but the last (kakaobrain/karlo-v1-alpha, super_res_first)."""

from unclip_jax.config import (
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    UNetConfig,
    UpsamplerConfig,
)


def get_config() -> TrainConfig:
    """691,579,523 parameters; additive time conditioning, fixed variances."""
    return TrainConfig(
        name="karlo_up256",
        network=UpsamplerConfig(
            unet=UNetConfig(in_channels=6, channels=320, multipliers=(1, 2, 3, 4), depth=3, scale_shift=False),
            low_size=64,
            size=256,
            degradation="blur",
        ),
        diffusion=DiffusionConfig(schedule="cosine", steps=1000),
        sample=SampleConfig(sampler="ddpm", steps=7),
        data=DataConfig(size=256, crop=64, low_size=64, degradation="blur", batch_size=1024),
        # Not published: the values of the paper's Table 3.
        optim=OptimConfig(learning_rate=1.2e-4, beta2=0.999, epsilon=1e-8, weight_decay=0.0, ema=0.9999),
        steps=1_000_000,
    )
