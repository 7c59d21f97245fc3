"""256 to 1024 px upsampler on emoji scenes: the one that ships."""

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
    """1.2M parameters, no attention; trains on 256 px crops, runs at 1024 px."""
    return TrainConfig(
        name="emoji_up1024",
        network=UpsamplerConfig(
            unet=UNetConfig(in_channels=6, channels=48, multipliers=(1, 1, 1), depth=1, groups=16, patch=4),
            low_size=256,
            size=1024,
            degradation="bsr",  # paper, section 2.1
            residual=True,
        ),
        # 48 channels cannot carry the noise of 4 x 4 x 3 pixels through, which epsilon and v would ask of them.
        diffusion=DiffusionConfig(schedule="linear", prediction="x0", timestep_mean=0.5, timestep_scale=1.4),
        sample=SampleConfig(sampler="ddim", steps=6),
        data=DataConfig(size=1024, crop=256, low_size=256, degradation="bsr", batch_size=4, single_fraction=0.5),
        optim=OptimConfig(learning_rate=2e-3, warmup=50, decay_steps=1250, ema=0.99),
        steps=1300,
        preview_every=325,
    )
