"""CLIP on emoji scenes: the one that ships."""

from unclip_jax.config import ClipConfig, DataConfig, OptimConfig, TrainConfig, TransformerConfig

MEAN_STD = ((0.7, 0.7, 0.6), (0.25, 0.25, 0.3))  # of the scenes, roughly


def get_config() -> TrainConfig:
    """1.6M parameters, 64 px, 8 px patches; pairs of scenes differ in one thing, so that relations count."""
    return TrainConfig(
        name="emoji_clip",
        network=ClipConfig(
            embedding_dim=128,
            image_size=64,
            patch_size=8,
            vision=TransformerConfig(width=128, layers=4, heads=4),
            text=TransformerConfig(width=128, layers=3, heads=4, causal=True),
            vocab_size=576,
            context_length=32,
            image_mean=MEAN_STD[0],
            image_std=MEAN_STD[1],
        ),
        data=DataConfig(batch_size=128, single_fraction=0.3, group=2),
        optim=OptimConfig(kind="muon", learning_rate=2e-3, warmup=50, decay_steps=1950, weight_decay=0.05, ema=0.995),
        steps=2000,
    )
