"""64 px decoder on emoji scenes: the one that ships."""

from unclip_jax.config import (
    DataConfig,
    DecoderConfig,
    DiffusionConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    UNetConfig,
)


def get_config() -> TrainConfig:
    """4.1M parameters; 4 x 4 pixels are folded into channels, which two CPU cores like better than wide maps."""
    return TrainConfig(
        name="emoji_decoder",
        network=DecoderConfig(
            unet=UNetConfig(
                channels=64,
                multipliers=(1, 1.5, 1.5),
                depth=1,
                attention_factors=(1, 2, 4),  # 16, 8 and 4 on the folded grid
                head_channels=32,
                context_dim=128,
                middle_attention=True,
                groups=16,
                patch=4,
                position_grid=16,
            ),
            size=64,
            image_embedding_dim=128,
            image_scale=11.3,  # sqrt(128): our CLIP embeddings have unit length
            text_dim=128,
            extra_tokens=4,
            image_drop=0.1,
            text_drop=0.5,
            learned_null_text=True,
            context_length=32,
        ),
        # A drawing of flat colours shows what it is down to very low signal (beyond t = 0.85 only the conditions
        # tell), so uniform timesteps would seldom train what the words mean.
        diffusion=DiffusionConfig(prediction="x0", timestep_mean=1.3, timestep_scale=1.3),
        sample=SampleConfig(sampler="ddim", steps=40, guidance=1.5),
        data=DataConfig(batch_size=32),
        optim=OptimConfig(learning_rate=1e-3, warmup=100, decay_steps=12000, ema=0.998),
        steps=12000,
        preview_every=500,
    )
