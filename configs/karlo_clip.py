"""The CLIP that Karlo is built on: OpenAI's ViT-L/14, whose text tower and image tower it takes unchanged."""

from unclip_jax.config import ClipConfig, DataConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    """427,616,513 parameters; the optimiser is the original CLIP's (arXiv 2103.00020, appendix F)."""
    return TrainConfig(
        name="karlo_clip",
        network=ClipConfig(unit_length=False),  # its other defaults are ViT-L/14
        data=DataConfig(size=224, batch_size=32_768, context_length=77),
        optim=OptimConfig(
            learning_rate=4e-4,
            warmup=2000,
            decay_steps=388_000,
            final_fraction=0.0,
            beta2=0.98,
            epsilon=1e-6,
            weight_decay=0.2,
        ),
        steps=390_000,  # 32 epochs of 400M pictures
    )
