"""The step that a plan compiles: the real training step or sampler of a config, with shapes in place of arrays."""

from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from unclip_jax.config import ArPriorConfig, ClipConfig, DecoderConfig, Dtype, PriorConfig, TrainConfig, UpsamplerConfig
from unclip_jax.generate import decode, upsample
from unclip_jax.inputs import Text, table_of
from unclip_jax.models.clip import Clip
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.precision import dtype_of
from unclip_jax.models.prior import Whitening
from unclip_jax.models.quantiser import Quantiser
from unclip_jax.overrides import available_configs, load_config
from unclip_jax.priors import sample_ar_prior, sample_prior
from unclip_jax.sharding import batch_sharding, check_batch_size, replicated, shard_state
from unclip_jax.stages import build
from unclip_jax.train import init_state, jitted_step
from unclip_jax.types import Batch

What = Literal["train", "sample"]


class Step(NamedTuple):
    """A jitted function, the shapes and shardings that it is called with, and what one call makes.

    images: per call. trips: iterations of its loops whose number is data. parameters: of the network, a count.
    """

    function: Any
    arguments: tuple[Any, ...]
    images: int
    trips: int
    parameters: int


def frozen_clip(config: TrainConfig, name: str | None = None) -> ClipConfig | None:
    """The CLIP that a network is trained on: a config by name, else its own family's, such as dalle2_clip.

    None for networks that read none. Raises ValueError where there is none of that name.
    """
    if not isinstance(config.network, PriorConfig | ArPriorConfig | DecoderConfig):
        return None
    family = name or f"{config.name.split('_')[0]}_clip"
    if name is None and family not in available_configs():
        raise ValueError(f"{config.name} trains on a frozen CLIP: name its config with --clip, such as dalle2_clip")
    network = load_config(family).network
    if not isinstance(network, ClipConfig):
        raise ValueError(f"{family} is no CLIP: name a config such as dalle2_clip")
    return network


def build_step(config: TrainConfig, clip: ClipConfig | None, what: What, batch: int, mesh: Mesh) -> Step:
    """The training step or the whole sampling loop of a config for a global batch on a mesh.

    Raises ValueError where the batch does not divide over the mesh.
    """
    config = replace(config, data=replace(config.data, batch_size=batch))
    check_batch_size(batch, mesh, config.optim.accumulate if what == "train" else 1)
    return _training(config, clip, mesh) if what == "train" else _sampling(config, clip, mesh)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _like(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes of a tree of arrays, all sharded alike."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding), tree)


def _shape(dtype: Any, *sides: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, dtype)


def _count(params: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def _training(config: TrainConfig, clip: ClipConfig | None, mesh: Mesh) -> Step:
    stage = build(config, clip)
    state = jax.eval_shape(partial(init_state, config, stage, mesh))
    shardings = shard_state(state, mesh)
    context = _context(config, clip)
    key = _like(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    arguments = (
        _placed(state, shardings),
        _placed(context, shard_state(context, mesh, strict=False)),
        _like(training_batch(config, clip), batch_sharding(mesh)),
        key,
    )
    return Step(jitted_step(config, stage, mesh), arguments, config.data.batch_size, 1, _count(state.params))


def training_batch(config: TrainConfig, clip: ClipConfig | None) -> Batch:
    """Shapes of a training batch; priors and decoders get CLIP's image embeddings, computed once and stored."""
    data, rows = config.data, config.data.batch_size
    side, low, embedding, length = data.crop or data.size, None, None, data.context_length
    match config.network:
        case ClipConfig(image_size=size, context_length=n):
            side, length = size, n
        case PriorConfig(embedding_dim=z, context_length=n) | ArPriorConfig(embedding_dim=z, context_length=n):
            side, length, embedding = 1, n, _shape(jnp.float32, rows, z)
        case DecoderConfig(image_embedding_dim=z, context_length=n):
            length, embedding = (
                (n if config.network.text_encoder else data.context_length),
                _shape(jnp.float32, rows, z),
            )
        case UpsamplerConfig() as network:
            side = data.crop or int(network.size * network.crop_fraction)
            low = _shape(
                jnp.uint8, rows, side * network.low_size // network.size, side * network.low_size // network.size, 3
            )
    length = clip.context_length if clip is not None and _reads_clip(config) else length
    image, tokens = _shape(jnp.uint8, rows, side, side, 3), _shape(jnp.int32, rows, length)
    batch: Any = Batch(image, tokens, _shape(jnp.bool_, rows, length), low, embedding)  # type: ignore[arg-type]
    return batch


def loss_shapes(config: TrainConfig, clip: ClipConfig | None, rows: int) -> tuple[Any, ...]:
    """Shapes of what a stage's loss takes: parameters, frozen context, a batch of so many rows, a key."""
    config = replace(config, data=replace(config.data, batch_size=rows))
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(build(config, clip).init, key)
    return params, _context(config, clip), training_batch(config, clip), key


def _reads_clip(config: TrainConfig) -> bool:
    """Whether captions pass through CLIP's text tower in every step."""
    return not isinstance(config.network, DecoderConfig) or config.network.text_encoder is None


def _clip_params(clip: ClipConfig) -> Any:
    side, n = clip.image_size, clip.context_length
    shapes = _shape(jnp.float32, 1, side, side, 3), _shape(jnp.int32, 1, n)
    return jax.eval_shape(Clip(clip).init, jax.eval_shape(lambda: jax.random.key(0)), *shapes)["params"]


def _context(config: TrainConfig, clip: ClipConfig | None) -> dict[str, Any]:
    """Shapes of the frozen trees that a prior or decoder reads, as `run` makes them."""
    if clip is None:
        return {}
    n = clip.context_length
    empty = {"tokens": _shape(jnp.int32, 1, n), "mask": _shape(jnp.bool_, 1, n)}
    context = {"clip": _clip_params(clip), "empty": empty}
    match config.network:
        case PriorConfig(embedding_dim=z):
            context["whitening"] = Whitening(*[_shape(jnp.float32, z)] * 2)._asdict()  # type: ignore[arg-type]
        case ArPriorConfig() as network:
            context["quantiser"] = _quantiser(network)._asdict()
    return context


def _quantiser(network: ArPriorConfig) -> Quantiser:
    z, k = network.embedding_dim, network.components
    f = partial(_shape, jnp.float32)
    shapes: Any = (f(z), f(z, k), f(k), f(k), _shape(jnp.int32), f(network.dot_buckets - 1))
    return Quantiser(*shapes)


def _sampling(config: TrainConfig, clip: ClipConfig | None, mesh: Mesh) -> Step:
    """A sampler's whole loop; parameters in the compute dtype, rows over the batch axes."""
    rows, network = config.data.batch_size, config.network
    steps, whole, split = config.sample.steps, replicated(mesh), batch_sharding(mesh)
    keys = _like(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)), split)
    stage_params = jax.eval_shape(build(config, clip).init, jax.eval_shape(lambda: jax.random.key(0)))
    dtype = dtype_of(compute_dtype(config))
    params = jax.tree.map(lambda x: _shape(dtype, *x.shape), stage_params)
    params = _placed(params, shard_state(params, mesh, strict=False))
    count = _count(params)
    number, scale = _like(_shape(jnp.float32), whole), _like(_shape(jnp.float32, rows), split)

    def text(count: int, sharding: NamedSharding, states: int, n: int, pooled: int) -> Text:
        shapes = _shape(dtype, count, n, states), _shape(jnp.bool_, count, n), _shape(dtype, count, pooled)
        return _like(Text(*shapes), sharding)  # type: ignore[arg-type]

    match network:
        case UpsamplerConfig(low_size=k):
            low, table = _like(_shape(jnp.float32, rows, k, k, 3), split), _like(table_of(config, steps), whole)
            return Step(
                _static(upsample, config, config.sample.sampler), (params, keys, low, table, number), rows, steps, count
            )
        case DecoderConfig():
            n = network.context_length if network.text_encoder or clip is None else clip.context_length
            embedding, table = (
                _like(_shape(jnp.float32, rows, network.image_embedding_dim), split),
                table_of(config, steps),
            )
            table = _like(table, whole)
            tokens, mask = _like((_shape(jnp.int32, rows, n), _shape(jnp.bool_, rows, n)), split)
            given = text(rows, split, network.text_dim, n, network.image_embedding_dim)
            null = text(1, whole, network.text_dim, n, network.image_embedding_dim) if network.empty_null_text else None
            function = jax.jit(partial(_decode, config))
            captions = (tokens, mask) if network.text_encoder else given
            return Step(function, (params, keys, embedding, captions, null, table, scale, number), rows, steps, count)
        case PriorConfig(embedding_dim=z, text_dim=d, context_length=n):
            table, white = _like(table_of(config, steps), whole), _like(Whitening(*[_shape(jnp.float32, z)] * 2), whole)  # type: ignore[arg-type]
            function = _static(sample_prior, config, config.sample.sampler, config.sample.candidates)
            texts = text(rows, split, d, n, z), text(1, whole, d, n, z)
            return Step(function, (params, white, keys, *texts, table, scale, number), rows, steps, count)
        case ArPriorConfig(embedding_dim=z, text_dim=d, context_length=n):
            texts = text(rows, split, d, n, z), text(1, whole, d, n, z)
            arguments = (params, _like(_quantiser(network), whole), keys, *texts, scale, scale)
            return Step(_static(sample_ar_prior, config), arguments, rows, 1, count)
        case ClipConfig(image_size=side, context_length=n):
            shapes = _like((_shape(jnp.float32, rows, side, side, 3), _shape(jnp.int32, rows, n)), split)
            function = jax.jit(
                lambda params, pixels, tokens: Clip(network).apply({"params": params}, pixels, tokens)[:2]
            )
            return Step(function, (params, *shapes), rows, 1, count)


def _static(function: Any, *values: Any) -> Any:
    """A jitted function whose first, static arguments are given."""
    return jax.jit(partial(function, *values))


def _decode(
    config: TrainConfig,
    params: Any,
    keys: Any,
    embedding: Any,
    captions: Any,
    null: Any,
    table: Any,
    scale: Any,
    number: Any,
) -> Any:
    """decode, after the decoder's own text encoder where it has one."""
    assert isinstance(config.network, DecoderConfig)
    if config.network.text_encoder is not None:
        encode = partial(Decoder(config.network).apply, {"params": params}, method="encode_text")
        encoded: Any = encode(*captions)
        captions = Text(encoded[0], captions[1], encoded[1])
    return decode(
        config, config.sample.sampler, params, keys, embedding, captions, table, scale, number, number, null=null
    )


def compute_dtype(config: TrainConfig) -> Dtype:
    """What most of a network computes in."""
    match config.network:
        case ClipConfig(vision=part) | PriorConfig(transformer=part) | ArPriorConfig(transformer=part):
            return part.dtype
        case DecoderConfig(unet=part) | UpsamplerConfig(unet=part):
            return part.dtype


__all__ = ["Step", "What", "build_step", "compute_dtype", "frozen_clip", "loss_shapes", "training_batch"]
