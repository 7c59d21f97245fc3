"""Third of the three networks of the quick recipe: a small decoder; its samples tell whether training works."""

from unclip_jax.config import (
    DataConfig,
    DecoderConfig,
    DiffusionConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    UNetConfig,
)

CONCEPTS = ("cat", "car", "fish", "penguin", "turtle", "pizza", "grapes", "present")


def get_config() -> TrainConfig:
    """Under 4M parameters on a 16 x 16 grid: 4 x 4 pixels are folded into channels."""
    return TrainConfig(
        name="quick_decoder",
        network=DecoderConfig(
            unet=UNetConfig(
                channels=64,
                multipliers=(1, 1.5),
                depth=1,
                attention_factors=(2,),
                head_channels=32,
                context_dim=96,
                middle_attention=True,
                groups=16,
                patch=4,
                position_grid=16,
            ),
            size=64,
            image_embedding_dim=64,
            image_scale=8.0,  # sqrt(64)
            text_dim=96,
            learned_null_text=True,
            context_length=32,
        ),
        diffusion=DiffusionConfig(prediction="x0", timestep_mean=1.0, timestep_scale=1.3),
        sample=SampleConfig(sampler="ddim", steps=40, guidance=3.0),
        data=DataConfig(concepts=CONCEPTS, single_fraction=1.0, batch_size=32),
        optim=OptimConfig(learning_rate=2e-3, warmup=50, decay_steps=900, ema=0.99),
        steps=950,
        preview_every=190,
        save_every=950,
    )
