"""The paper's autoregressive prior (arXiv 2204.06125, section 2.2 and Table 3)."""

from unclip_jax.config import ArPriorConfig, DataConfig, OptimConfig, SampleConfig, TrainConfig, TransformerConfig


def get_config() -> TrainConfig:
    """About 0.8B parameters, the paper's latent decoder alone: it reads the states of dalle2_clip's text tower.

    The paper's own text encoder (24 layers of width 2048, 1.2B) is left out, as in dalle2_prior. Table 3 gives the
    latent decoder 384 places, of which 65 are not tokens, and does not say what they hold; here they are all the states
    of the caption, 256, and two more.
    """
    return TrainConfig(
        name="dalle2_ar_prior",
        network=ArPriorConfig(
            embedding_dim=1024,
            text_dim=1024,
            context_length=256,
            components=319,
            buckets=1024,
            dot_buckets=50,  # not stated
            transformer=TransformerConfig(1664, 24, 26, causal=True, dtype="bfloat16", scan=True),
            text_drop=0.1,
        ),
        sample=SampleConfig(guidance=1.0),
        data=DataConfig(batch_size=4096, context_length=256),
        optim=OptimConfig(learning_rate=1.6e-4, beta2=0.91, epsilon=1e-10, weight_decay=4e-2, ema=0.999),
        steps=1_000_000,
    )
