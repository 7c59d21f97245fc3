"""Karlo v1 alpha's prior (kakaobrain/karlo-v1-alpha, prior/config.json)."""

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
    """1,022,030,080 numbers in the published file, of which 2 x 768 are whitening statistics and no parameters."""
    return TrainConfig(
        name="karlo_prior",
        network=PriorConfig(
            embedding_dim=768,
            text_dim=768,
            context_length=77,
            transformer=TransformerConfig(2048, 20, 32, causal=True),  # heads of 64
            text_drop=0.2,  # Karlo's training file
            unit_length=False,
        ),
        diffusion=DiffusionConfig(schedule="cosine", steps=1000, prediction="x0", clip=5.0),
        sample=SampleConfig(sampler="ddpm", steps=25, guidance=4.0),
        data=DataConfig(batch_size=4096, context_length=77),
        # Not published: the values of the paper's Table 3.
        optim=OptimConfig(learning_rate=1.1e-4, beta2=0.96, epsilon=1e-6, weight_decay=6e-2, ema=0.9999),
        steps=1_000_000,
    )
