"""First of the three networks of the quick recipe: a CLIP of eight concepts."""

from unclip_jax.config import ClipConfig, DataConfig, OptimConfig, TrainConfig, TransformerConfig

CONCEPTS = ("cat", "car", "fish", "penguin", "turtle", "pizza", "grapes", "present")


def get_config() -> TrainConfig:
    """0.7M parameters; single objects on eight backgrounds."""
    return TrainConfig(
        name="quick_clip",
        network=ClipConfig(
            embedding_dim=64,
            image_size=64,
            patch_size=8,
            vision=TransformerConfig(width=96, layers=3, heads=3),
            text=TransformerConfig(width=96, layers=2, heads=3, causal=True),
            vocab_size=560,
            context_length=32,
            image_mean=(0.7, 0.7, 0.6),
            image_std=(0.25, 0.25, 0.3),
        ),
        data=DataConfig(concepts=CONCEPTS, single_fraction=1.0, batch_size=64),
        optim=OptimConfig(learning_rate=1e-3, warmup=50, decay_steps=250, ema=0.98),
        steps=300,
        save_every=300,
    )
