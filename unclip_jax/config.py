"""Frozen dataclasses, one per network and one per concern; every default is written here and nowhere else."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16", "float16"]
PredictionType = Literal["epsilon", "x0", "v"]
# What a block keeps for its backward pass: everything, its convolutions and matrix products, or its input alone.
Remat = Literal["none", "products", "block"]


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of pre-norm transformer blocks; head width is width / heads unless head_dim says otherwise."""

    width: int = 512
    layers: int = 12
    heads: int = 8
    head_dim: int | None = None
    mlp_ratio: float = 4.0
    activation: Literal["gelu", "quick_gelu"] = "gelu"  # gelu is the exact one
    norm_epsilon: float = 1e-5
    causal: bool = False
    dropout: float = 0.0
    dtype: Dtype = "float32"  # compute; parameters are float32 in training
    remat: Remat = field(default="none", compare=False)  # the same network, whichever it is
    # All layers as one, compiled once: their parameters lie in one tree, along a leading axis.
    scan: bool = False


@dataclass(frozen=True)
class ClipConfig:
    """Two towers and a temperature (arXiv 2103.00020); the defaults are OpenAI's ViT-L/14."""

    embedding_dim: int = 768
    image_size: int = 224
    patch_size: int = 14
    vision: TransformerConfig = TransformerConfig(1024, 24, 16, activation="quick_gelu")
    text: TransformerConfig = TransformerConfig(768, 12, 12, activation="quick_gelu", causal=True)
    vocab_size: int = 49408
    context_length: int = 77
    eos_id: int | None = None  # None: the end of text is the largest id of the row (OpenAI's legacy rule)
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    temperature: float = 0.07  # initial
    max_logit_scale: float = 100.0
    unit_length: bool = True  # of the embeddings that priors and decoders see; False: as projected (Karlo)


@dataclass(frozen=True)
class PriorConfig:
    """Diffusion prior (paper section 2.2; Karlo's PriorTransformer): text -> CLIP image embedding, predicts x0."""

    embedding_dim: int = 768
    text_dim: int = 768  # width of the text states that it reads
    context_length: int = 77
    transformer: TransformerConfig = TransformerConfig(2048, 20, 32, causal=True)
    text_drop: float = 0.1
    unit_length: bool = True  # of what it makes, as CLIP's


@dataclass(frozen=True)
class ArPriorConfig:
    """Autoregressive prior (paper section 2.2): text -> CLIP image embedding, as one token per principal component."""

    embedding_dim: int = 768
    text_dim: int = 768  # width of the text states that it reads
    context_length: int = 77
    components: int = 319  # tokens; at least as many as keep 99% of the embeddings' variance
    buckets: int = 1024  # of a component's coefficient
    dot_buckets: int = 50  # of z_i . z_t
    transformer: TransformerConfig = TransformerConfig(1664, 24, 26, causal=True)
    text_drop: float = 0.1


@dataclass(frozen=True)
class UNetConfig:
    """ADM U-Net (arXiv 2105.05233): sizes as in the paper's Table 3; channels * multipliers per level."""

    in_channels: int = 3
    out_channels: int = 3
    channels: int = 320
    multipliers: tuple[int | float, ...] = (1, 2, 3, 4)
    depth: int = 3  # residual blocks per level
    # Downsampling factors, in units of the stem's grid, at which attention runs; (2, 4, 8) is 32, 16, 8 at 64 px.
    attention_factors: tuple[int, ...] = ()
    head_channels: int = 64
    context_dim: int | None = None  # width of the extra attention keys, None: no context
    scale_shift: bool = True  # adaptive group norm; False: additive time conditioning
    middle_attention: bool = False
    groups: int = 32
    norm_epsilon: float = 1e-5
    dropout: float = 0.0
    patch: int = 1  # folds patch x patch pixels into channels before the stem
    position_grid: int | None = None  # learned positions for a fixed grid of this side (after the fold), None: none
    dtype: Dtype = "float32"
    remat: Remat = field(default="none", compare=False)

    @property
    def embedding_dim(self) -> int:
        """Width of the time embedding: four times the base channels."""
        return 4 * self.channels


@dataclass(frozen=True)
class DecoderConfig:
    """unCLIP decoder (paper section 2.1; Karlo's UNet2DConditionModel + UnCLIPTextProjModel)."""

    unet: UNetConfig = UNetConfig(out_channels=6, attention_factors=(2, 4, 8), context_dim=1536, middle_attention=True)
    size: int = 64
    image_embedding_dim: int = 768
    image_scale: float = 1.0  # on z_i before its projections; sqrt(dim) gives unit-length embeddings unit variance
    text_dim: int = 768  # width of the text states
    text_embedding: bool = True  # Karlo also adds a projection of z_t to the time embedding
    extra_tokens: int = 4
    image_drop: float = 0.1
    text_drop: float = 0.5
    text_encoder: TransformerConfig | None = None  # the paper's own text encoder (width 2048), reading tokens
    vocab_size: int = 49408  # of that encoder
    context_length: int = 77
    # Dropped captions become learned tokens, or else the empty caption (Karlo), or else they are masked out.
    learned_null_text: bool = False
    empty_null_text: bool = False


@dataclass(frozen=True)
class UpsamplerConfig:
    """Convolution-only upsampler (paper section 2.1): concatenates the resized low-resolution picture."""

    unet: UNetConfig = UNetConfig(in_channels=6)
    low_size: int = 64
    size: int = 256
    degradation: Literal["blur", "bsr", "none"] = "blur"
    crop_fraction: float = 0.25  # training crops, as a share of the target side
    residual: bool = False  # the network adds to the resized picture; of prediction x0 alone
    last_step: bool = False  # another U-Net of the same config takes the step at t = 0 (Karlo); sampled, never trained
    text_encoder: TransformerConfig | None = None  # GLIDE's upsampler reads tokens too; its width is unet.context_dim
    vocab_size: int = 49408  # of that encoder
    context_length: int = 77


@dataclass(frozen=True)
class DiffusionConfig:
    """Noise process and its parametrisation; stored in every checkpoint and read from there when sampling."""

    schedule: Literal["cosine", "linear"] = "cosine"
    steps: int = 1000
    prediction: PredictionType = "epsilon"
    learned_variance: bool = False
    vlb_weight: float = 0.001  # lambda of the hybrid loss
    min_snr_gamma: float | None = None  # arXiv 2303.09556, None: plain MSE of the parametrisation
    # Training timesteps: uniform, or logit-normal with this mean and scale (in units of t / steps).
    timestep_mean: float | None = None
    timestep_scale: float = 1.0
    clip: float | None = 1.0  # static clipping of x0 when sampling
    offset: float = 0.0  # std of a per-channel constant added to the training noise


@dataclass(frozen=True)
class SampleConfig:
    """Recommended sampling of one stage; a command's options override it."""

    sampler: Literal["ddpm", "ddim", "dpm", "analytic"] = "ddim"  # analytic: of diffusion priors, after unclip analytic
    steps: int = 25
    guidance: float = 1.0
    rescale: float = 0.0
    eta: float = 0.0
    temperature: float = 1.0  # of the autoregressive prior, which reads this and guidance alone
    candidates: int = 2  # of the diffusion prior


@dataclass(frozen=True)
class OptimConfig:
    """AdamW or Muon with decay mask, warm-up, optional cosine decay, clipping and EMA."""

    learning_rate: float = 1e-3
    warmup: int = 200
    decay_steps: int | None = None  # cosine to final_fraction over so many updates after warm-up; None: constant
    final_fraction: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 0.999
    accumulate: int = 1
    # muon: hidden matrices and convolutions step along the nearest orthogonal matrix; AdamW keeps the other leaves.
    kind: Literal["adamw", "muon"] = "adamw"


@dataclass(frozen=True)
class DataConfig:
    """Which pictures a stage sees."""

    # emoji, folder:PATH, table:PATH, tar:PATH, tfds:NAME:SPLIT, hf:PATH, stored:PATH, or mix:0.7*SPEC,0.3*SPEC.
    source: str = "emoji"
    concepts: tuple[str, ...] = ()  # () is the shipped vocabulary
    backgrounds: tuple[str, ...] = ()
    single_fraction: float = 0.4  # scenes of one object
    size: int = 64
    crop: int | None = None  # side of a random training crop, None: the whole picture
    low_size: int | None = None  # side of the degraded low-resolution picture that belongs to a whole picture
    degradation: Literal["blur", "bsr", "none"] = "none"
    batch_size: int = 32
    context_length: int = 32
    stored: int = 0  # embed so many pictures once and train on those; 0 embeds every picture as it comes
    redrawn: int = 0  # so many small pictures drawn by the cascade's own decoder, which every other record shows
    group: int = 1  # scenes in groups that differ in one thing: CLIP's hard negatives
    seed: int = 0
    skip: str | None = None  # list of keys that are left out, as unclip data check --fix writes it
    weights: str | None = None  # file of sampling weights: .safetensors of unclip data curate, .npy, .jsonl or .csv
    max_broken: float = 0.01  # share of rows that may be replaced because their record is broken
    uncaptioned: Literal["skip", "empty"] = "skip"  # pictures without a caption are broken, or have the empty one
    templates: tuple[str, ...] = ()  # such as "a photo of {}", one of which every caption is put into
    caption_drop: float = 0.0  # share of rows that have the empty caption; decoders and priors drop captions themselves
    # Processes that read and decode, None: half as many as there are cores. The batches are the same.
    workers: int | None = field(default=None, compare=False, repr=False)


NetworkConfig = ClipConfig | PriorConfig | ArPriorConfig | DecoderConfig | UpsamplerConfig


@dataclass(frozen=True)
class TrainConfig:
    """One training run: one network, its diffusion process, data, optimiser and loop."""

    name: str
    network: NetworkConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    sample: SampleConfig = SampleConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    steps: int = 10_000
    seed: int = 0
    strategy: str = "dp"  # of the devices: dp, fsdp, tp, hsdp, spatial, or sizes such as fsdp=4,tensor=2
    remat: Remat | None = None  # of every block of the network, None: as its parts say
    clip: str | None = None  # folder or file of the frozen CLIP that prior and decoder are trained on
    log_every: int = 20
    preview_every: int = 500
    save_every: int = 500
    keep: int = 2  # newest checkpoints
    keep_best: int = 1  # of lowest loss in training, or highest score in evaluation, beside the newest
    keep_by: Literal["loss", "score"] = "loss"
    eval_every: int = 0  # steps between small evaluations on pictures that training does not see, 0: none
    eval_pictures: int = 32
    eval_source: str | None = None  # of those pictures, None: held-out scenes
    max_skipped: int = 10  # consecutive non-finite updates before training stops
    tags: dict[str, str] = field(default_factory=dict, hash=False)  # a config is a static argument, hashed


def with_remat(network: NetworkConfig, remat: Remat) -> NetworkConfig:
    """The same network, each of whose blocks keeps what `remat` says."""
    network = with_transformers(network, remat=remat)
    match network:
        case DecoderConfig() | UpsamplerConfig():
            return replace(network, unet=replace(network.unet, remat=remat))
    return network


def with_transformers(network: NetworkConfig, **changes: Any) -> NetworkConfig:
    """The same network, with other fields of each of its transformers."""
    match network:
        case ClipConfig():
            vision, text = replace(network.vision, **changes), replace(network.text, **changes)
            return replace(network, vision=vision, text=text)
        case PriorConfig() | ArPriorConfig():
            return replace(network, transformer=replace(network.transformer, **changes))
        case DecoderConfig() | UpsamplerConfig():
            return replace(network, text_encoder=network.text_encoder and replace(network.text_encoder, **changes))
