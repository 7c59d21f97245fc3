"""Second of the three networks of the quick recipe: a small prior, trained on stored embeddings."""

from unclip_jax.config import (
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    PriorConfig,
    SampleConfig,
    TrainConfig,
    TransformerConfig,
)

CONCEPTS = ("cat", "car", "fish", "penguin", "turtle", "pizza", "grapes", "present")


def get_config() -> TrainConfig:
    """0.5M parameters."""
    return TrainConfig(
        name="quick_prior",
        network=PriorConfig(
            embedding_dim=64,
            text_dim=96,
            context_length=32,
            transformer=TransformerConfig(width=96, layers=3, heads=3, causal=True),
        ),
        diffusion=DiffusionConfig(prediction="x0", timestep_mean=0.8, timestep_scale=1.4, clip=5.0),
        sample=SampleConfig(sampler="ddpm", steps=16, guidance=1.5),
        data=DataConfig(concepts=CONCEPTS, single_fraction=1.0, batch_size=128, stored=4096),
        optim=OptimConfig(learning_rate=1e-3, warmup=50, decay_steps=270, ema=0.98),
        steps=300,
        save_every=300,
    )
