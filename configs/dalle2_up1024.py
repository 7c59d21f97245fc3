"""The paper's 256 to 1024 px upsampler (arXiv 2204.06125, section 2.1 and Table 3)."""

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
    """282M parameters with learned variances, no attention."""
    return TrainConfig(
        name="dalle2_up1024",
        network=UpsamplerConfig(
            unet=UNetConfig(
                in_channels=6,
                out_channels=6,
                channels=192,
                multipliers=(1, 1, 2, 2, 4, 4),
                depth=2,
                dtype="bfloat16",
            ),
            low_size=256,
            size=1024,
            degradation="bsr",
            crop_fraction=0.25,
        ),
        diffusion=DiffusionConfig(schedule="linear", steps=1000, learned_variance=True),
        sample=SampleConfig(sampler="ddim", steps=15),
        data=DataConfig(size=1024, crop=256, low_size=256, degradation="bsr", batch_size=512),
        optim=OptimConfig(learning_rate=1.0e-4, beta2=0.999, epsilon=1e-8, weight_decay=0.0, ema=0.9999),
        steps=1_000_000,
    )
