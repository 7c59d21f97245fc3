"""Diffusion prior on emoji scenes: the one that ships."""

from unclip_jax.config import (
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    PriorConfig,
    SampleConfig,
    TrainConfig,
    TransformerConfig,
)


def get_config() -> TrainConfig:
    """1.4M parameters; predicts the clean whitened embedding, as in the paper."""
    return TrainConfig(
        name="emoji_prior",
        network=PriorConfig(
            embedding_dim=128,
            text_dim=128,
            context_length=32,
            transformer=TransformerConfig(width=160, layers=4, heads=5, causal=True),
            text_drop=0.1,
        ),
        # More than half of the steps where little but the caption tells what the embedding is.
        diffusion=DiffusionConfig(prediction="x0", timestep_mean=0.8, timestep_scale=1.4, clip=5.0),
        sample=SampleConfig(sampler="ddpm", steps=32, guidance=1.5),
        data=DataConfig(batch_size=128, stored=32_768),
        optim=OptimConfig(kind="muon", learning_rate=2e-3, warmup=100, decay_steps=800, ema=0.995),
        steps=900,
    )
