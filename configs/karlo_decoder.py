"""Karlo v1 alpha's decoder (kakaobrain/karlo-v1-alpha, decoder/config.json and text_proj/config.json)."""

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
    """885,439,686 parameters in the U-Net and 7,878,400 in the projections."""
    return TrainConfig(
        name="karlo_decoder",
        network=DecoderConfig(
            unet=UNetConfig(
                out_channels=6,  # learned variances
                channels=320,
                multipliers=(1, 2, 3, 4),
                depth=3,
                attention_factors=(2, 4, 8),  # 32, 16 and 8 px
                head_channels=64,
                context_dim=1536,
                middle_attention=True,
                dropout=0.1,
            ),
            size=64,
            image_embedding_dim=768,
            text_dim=768,
            extra_tokens=4,
            image_drop=0.1,
            text_drop=0.3,  # this, image_drop and dropout: Karlo's training file
            empty_null_text=True,
        ),
        diffusion=DiffusionConfig(schedule="cosine", steps=1000, learned_variance=True),
        sample=SampleConfig(sampler="ddpm", steps=25, guidance=8.0),
        data=DataConfig(size=64, batch_size=2048, context_length=77),
        # Not published: the values of the paper's Table 3.
        optim=OptimConfig(learning_rate=1.2e-4, beta2=0.999, epsilon=1e-8, weight_decay=0.0, ema=0.9999),
        steps=1_000_000,
    )
