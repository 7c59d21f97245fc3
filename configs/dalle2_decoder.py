"""The paper's 64 px decoder, GLIDE's 3.5B with an image embedding (arXiv 2204.06125, section 2.1 and Table 3)."""

from unclip_jax.config import (
    DataConfig,
    DecoderConfig,
    DiffusionConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    TransformerConfig,
    UNetConfig,
)


def get_config() -> TrainConfig:
    """3,563M parameters, 1,310M of them the text encoder's."""
    return TrainConfig(
        name="dalle2_decoder",
        network=DecoderConfig(
            unet=UNetConfig(
                out_channels=6,  # learned variances
                channels=512,
                multipliers=(1, 2, 3, 4),
                depth=3,
                attention_factors=(2, 4, 8),  # 32, 16 and 8 px
                head_channels=64,
                context_dim=2048,
                middle_attention=True,
                dropout=0.1,
                dtype="bfloat16",
            ),
            size=64,
            image_embedding_dim=1024,
            text_dim=2048,
            extra_tokens=4,
            image_drop=0.1,
            text_drop=0.5,
            text_encoder=TransformerConfig(2048, 24, 32, dtype="bfloat16", scan=True),
            context_length=256,
            learned_null_text=True,
        ),
        diffusion=DiffusionConfig(schedule="cosine", steps=1000, learned_variance=True),
        sample=SampleConfig(sampler="ddpm", steps=250, guidance=1.25),  # guidance of the paper's COCO FID
        data=DataConfig(size=64, batch_size=2048, context_length=256),
        optim=OptimConfig(learning_rate=1.2e-4, beta2=0.999, epsilon=1e-8, weight_decay=0.0, ema=0.9999),
        steps=800_000,
    )
