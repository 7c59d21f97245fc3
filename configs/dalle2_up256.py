"""The paper's 64 to 256 px upsampler (arXiv 2204.06125, section 2.1 and Table 3)."""

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
    """730M parameters with learned variances, no attention."""
    return TrainConfig(
        name="dalle2_up256",
        network=UpsamplerConfig(
            unet=UNetConfig(
                in_channels=6,
                out_channels=6,
                channels=320,
                multipliers=(1, 2, 3, 4),
                depth=3,
                dropout=0.1,
                dtype="bfloat16",
            ),
            low_size=64,
            size=256,
            degradation="blur",  # Gaussian, kernel 3, sigma 0.6
            crop_fraction=0.25,
        ),
        diffusion=DiffusionConfig(schedule="cosine", steps=1000, learned_variance=True),
        sample=SampleConfig(sampler="ddim", steps=27),
        data=DataConfig(size=256, crop=64, low_size=64, degradation="blur", batch_size=1024),
        optim=OptimConfig(learning_rate=1.2e-4, beta2=0.999, epsilon=1e-8, weight_decay=0.0, ema=0.9999),
        steps=1_000_000,
    )
