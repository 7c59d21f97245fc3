"""`unclip data embed`: the CLIP of a cascade as two compiled functions of batches, and a whole source through them."""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, UInt8

from unclip_jax.cascade import SHIPPED, load_checked, tokenizer_from
from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.checkpoint.writing import replacing
from unclip_jax.config import ClipConfig
from unclip_jax.data.embed import Cut, Encoders, embed
from unclip_jax.data.embeddings import Part
from unclip_jax.data.records import open_source
from unclip_jax.inputs import embed_images, encode
from unclip_jax.sharding import check_batch_size, make_mesh, put_batch, replicated


def run(options: argparse.Namespace) -> None:
    """Embeds a source, and names the broken records of this part in a list beside the shards."""
    if min(options.batch, options.shard_rows, options.threads) < 1 or options.thumbnails < 0:
        raise ValueError("--batch, --shard-rows and --threads are positive numbers, and --thumbnails is a side in px")
    encoders = encoders_of(load_clip(options.clip), options.batch)
    part = Part.parse(options.part) if options.part else Part(jax.process_index(), jax.process_count())
    cut = Cut(options.shard_rows, options.dtype, options.mirror, options.thumbnails)
    done = embed(
        open_source(options.source),
        encoders,
        options.out,
        cut=cut,
        part=part,
        batch=options.batch,
        threads=options.threads,
        most_broken=options.most_broken,
    )
    if done.broken:
        path = options.out / f"broken-{part.index}-of-{part.count}.jsonl"
        with replacing(path) as temporary:
            lines = [json.dumps({"key": key, "why": why}, ensure_ascii=False) for key, why in done.broken]
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"unclip: {len(done.broken)} records are broken, see '{path}'", file=sys.stderr)
    print(f"{options.out}: {done.made} shards made, {done.found} were there")


def load_clip(path: Path | None) -> Network:
    """The CLIP of a weights file or of a cascade's folder, by default the one that ships."""
    path = path or SHIPPED
    clip = load_checked(path / "clip.safetensors" if path.is_dir() else path, ClipConfig)
    if "image_projection" not in clip.params:
        raise ValueError(f"the CLIP in '{path}' has no image tower: give one that has")
    return clip


def encoders_of(clip: Network, batch: int) -> Encoders:
    """A CLIP's two towers, compiled for batches of `batch` rows, which are split over this process's devices."""
    network = clip.config.network
    assert isinstance(network, ClipConfig)
    mesh = make_mesh("dp", jax.local_devices())
    check_batch_size(batch, mesh)
    params = jax.device_put(jax.tree.map(np.asarray, clip.params), replicated(mesh))
    tokenizer = tokenizer_from(clip)

    def image(pixels: UInt8[np.ndarray, "b s s 3"]) -> Float[np.ndarray, "b z"]:
        return np.asarray(embed_images(network, params, put_batch(pixels, mesh)), np.float32)

    def text(captions: list[str]) -> Float[np.ndarray, "b z"]:
        tokens = tokenizer.encode(captions)
        ids, mask = put_batch((tokens.ids, tokens.mask), mesh)
        return np.asarray(encode(clip.config, params, ids, mask).embedding, np.float32)

    return Encoders(image, text, network.image_size, network.embedding_dim, clip.digest)
