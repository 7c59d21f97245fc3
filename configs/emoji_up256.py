"""64 to 256 px upsampler on emoji scenes: the one that ships."""

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
    """1.1M parameters, no attention; trains on 64 px crops, runs at 256 px."""
    return TrainConfig(
        name="emoji_up256",
        network=UpsamplerConfig(
            unet=UNetConfig(in_channels=6, channels=48, multipliers=(1, 1, 1), depth=1, groups=16, patch=2),
            low_size=64,
            size=256,
            degradation="blur",  # kernel 3, sigma 0.6 (paper, section 2.1)
            residual=True,
        ),
        diffusion=DiffusionConfig(prediction="x0", timestep_mean=0.5, timestep_scale=1.4),
        sample=SampleConfig(sampler="ddim", steps=8),
        # Every other crop belongs to a picture that the decoder of the same folder drew.
        data=DataConfig(
            size=256, crop=64, low_size=64, degradation="blur", batch_size=16, single_fraction=0.5, redrawn=4096
        ),
        optim=OptimConfig(learning_rate=1e-3, warmup=100, decay_steps=800, ema=0.995),
        steps=900,
        preview_every=300,
    )
