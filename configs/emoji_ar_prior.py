"""Autoregressive prior on emoji scenes: the one that ships."""

from unclip_jax.config import ArPriorConfig, DataConfig, OptimConfig, SampleConfig, TrainConfig, TransformerConfig


def get_config() -> TrainConfig:
    """1.3M parameters; a token per principal component, drawn one after another."""
    return TrainConfig(
        name="emoji_ar_prior",
        network=ArPriorConfig(
            embedding_dim=128,
            text_dim=128,
            context_length=32,
            components=22,
            buckets=256,
            transformer=TransformerConfig(width=160, layers=4, heads=5, causal=True),
            text_drop=0.1,
        ),
        sample=SampleConfig(guidance=2.0, temperature=0.7),
        data=DataConfig(batch_size=128, stored=32_768),
        optim=OptimConfig(learning_rate=1.5e-3, warmup=50, decay_steps=800, weight_decay=0.04, ema=0.995),
        steps=900,
    )
