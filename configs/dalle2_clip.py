"""The paper's CLIP: ViT-H/16 and a 24-block text tower (arXiv 2204.06125, appendix C)."""

from unclip_jax.config import ClipConfig, DataConfig, OptimConfig, TrainConfig, TransformerConfig


def get_config() -> TrainConfig:
    """986M parameters; what the paper leaves to the original CLIP (arXiv 2103.00020) is marked."""
    return TrainConfig(
        name="dalle2_clip",
        network=ClipConfig(
            embedding_dim=1024,  # section 3.1: 1,024 components before PCA
            image_size=256,
            patch_size=16,
            vision=TransformerConfig(1280, 32, 16, dtype="bfloat16", scan=True),  # heads: ViT-H's usual 16
            text=TransformerConfig(1024, 24, 16, causal=True, dtype="bfloat16", scan=True),  # heads of 64, as in CLIP
            context_length=256,  # not stated; Table 3 gives every reader of text 256
        ),
        data=DataConfig(size=256, batch_size=32_768, context_length=256),  # batch: original CLIP
        optim=OptimConfig(
            learning_rate=3e-4,
            warmup=2000,  # this and the rest: original CLIP's ViT recipe
            decay_steps=633_000,
            final_fraction=0.0,
            beta2=0.98,
            epsilon=1e-6,
            weight_decay=0.2,
        ),
        steps=635_000,  # 32 epochs (original CLIP) of 650M pictures
    )
