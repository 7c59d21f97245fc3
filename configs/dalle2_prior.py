"""The paper's diffusion prior (arXiv 2204.06125, section 2.2 and Table 3)."""

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
    """About 1.2B parameters; it reads the states of dalle2_clip's text tower."""
    return TrainConfig(
        name="dalle2_prior",
        network=PriorConfig(
            embedding_dim=1024,
            text_dim=1024,
            context_length=256,
            transformer=TransformerConfig(2048, 24, 32, causal=True, dtype="bfloat16", scan=True),
            text_drop=0.1,
        ),
        diffusion=DiffusionConfig(schedule="cosine", steps=1000, prediction="x0", clip=None),
        sample=SampleConfig(sampler="ddpm", steps=64),  # paper: Analytic-DPM variances, 64 strided steps
        data=DataConfig(batch_size=4096, context_length=256),
        optim=OptimConfig(learning_rate=1.1e-4, beta2=0.96, epsilon=1e-6, weight_decay=6e-2, ema=0.9999),
        steps=600_000,
    )
