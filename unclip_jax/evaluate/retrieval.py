"""Retrieval among held-out scenes: what CLIP tells apart, and whether the prior's embeddings find their pictures."""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count as numbers

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from unclip_jax.cascade import tokenizer_from
from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.config import ClipConfig, TrainConfig
from unclip_jax.data.embeddings import unit
from unclip_jax.data.emoji import OPPOSITE, Renderer, Scene, Scenes
from unclip_jax.data.loader import scenes_of
from unclip_jax.evaluate.report import Figures, Report
from unclip_jax.inputs import RECOMMENDED, Options, Text, embed_images, encode, picture_keys
from unclip_jax.offload import on_device
from unclip_jax.priors import prior_embeddings

SET = 64  # scenes that a query chooses from
GROUP = 16  # variants drawn of a scene until one of each kind is found
PAIR_KINDS = ("object", "relation", "background")  # the one thing in which scenes of two objects differ
SINGLE_KINDS = ("object", "size", "background")
SHOWN = 12  # rows of the sheet, each the true picture and the nearest ones
NEAREST = 5


def top1(queries: Float[np.ndarray, "s n z"], keys: Float[np.ndarray, "s n z"]) -> float:
    """Share of queries that are closer (by inner product) to their own key than to any other of the set; ties miss."""
    similarity = np.einsum("sqz,skz->sqk", queries, keys)
    own = np.eye(similarity.shape[-1], dtype=bool)
    right = np.diagonal(similarity, axis1=1, axis2=2)
    return float((right > np.where(own, -np.inf, similarity).max(-1)).mean())


def mean_cosine(a: Float[np.ndarray, "*#b z"], b: Float[np.ndarray, "*#b z"]) -> float:
    """Mean cosine of the angle between vectors, row by row; either side may be broadcast."""
    return float((unit(a) * unit(b)).sum(-1).mean())


def held_out_scenes(config: TrainConfig, names: Sequence[str] = ()) -> Scenes:
    """Held-out scenes of the kind that a network was trained on; names: its concepts, where the file lists them."""
    data = replace(config.data, group=1, concepts=tuple(names) or config.data.concepts)
    return scenes_of(data, "held_out")


def meaning(scene: Scene) -> tuple:
    """What a scene shows, the same whichever object comes first."""
    things = tuple((item.concept.name, item.side) for item in scene.items)
    return min((things, scene.relation or "", scene.background),
               (things[::-1], OPPOSITE[scene.relation] if scene.relation else "", scene.background))  # fmt: skip


def distinct_sets(scenes: Scenes, sets: int, size: int = SET) -> list[tuple[Scene, ...]]:
    """Sets of scenes of which no two in a set mean the same; ValueError where there are too few."""
    found: list[tuple[Scene, ...]] = []
    index = 0
    for _ in range(sets):
        chosen: dict[tuple, Scene] = {}
        last = index + 20 * size
        while len(chosen) < size:
            if index == last:
                raise ValueError(f"these concepts make fewer than {size} held-out scenes that differ")
            chosen.setdefault(meaning(scenes[index]), scenes[index])
            index += 1
        found.append(tuple(chosen.values()))
    return found


def difference(a: Scene, b: Scene) -> str | None:
    """The one thing in which two scenes of a group differ: object, size, relation or background; else None."""
    told = {
        "object": [[item.concept.name for item in scene.items] for scene in (a, b)],
        "size": [[item.side for item in scene.items] for scene in (a, b)],
        "relation": [scene.relation for scene in (a, b)],
        "background": [scene.background for scene in (a, b)],
    }
    kinds = [kind for kind, (first, second) in told.items() if first != second]
    return kinds[0] if len(kinds) == 1 else None


def hard_sets(scenes: Scenes, kinds: Sequence[str], sets: int) -> list[tuple[Scene, ...]]:
    """Sets of a scene followed by one variant per kind, which differs from it in just that.

    Raises ValueError where these scenes have no such variants.
    """
    grouped, found = replace(scenes, group=GROUP), []
    for number in numbers():
        if len(found) == sets:
            return found
        if number == 50 * sets:
            raise ValueError(f"these concepts do not have held-out scenes that differ in one of {', '.join(kinds)}")
        base, *others = (grouped[number * GROUP + member] for member in range(GROUP))
        variants = {difference(base, other): other for other in others}
        if all(kind in variants for kind in kinds):
            found.append((base, *(variants[kind] for kind in kinds)))
    return found


def encode_captions(clip: Network, captions: Sequence[str]) -> Text:
    """Captions through CLIP's own tokenizer and text tower."""
    tokens = tokenizer_from(clip).encode(list(captions))
    return encode(clip.config, on_device(clip.params), tokens.ids, tokens.mask)


def embed_pictures(clip: Network, pictures: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b z"]:
    """CLIP's image embeddings at unit length."""
    assert isinstance(clip.config.network, ClipConfig)
    return np.asarray(embed_images(clip.config.network, on_device(clip.params), pictures))


def _embed_sets(
    clip: Network, sets: Sequence[Sequence[Scene]], renderer: Renderer, what: str
) -> tuple[Float[np.ndarray, "s n z"], Float[np.ndarray, "s n z"]]:
    """Caption and picture embeddings at unit length."""
    captions, pictures = [], []
    for scenes in tqdm(sets, desc=what, unit="set", dynamic_ncols=True):
        captions.append(unit(np.asarray(encode_captions(clip, [scene.caption for scene in scenes]).embedding)))
        pictures.append(embed_pictures(clip, np.stack([renderer.render(scene) for scene in scenes])))
    return np.stack(captions), np.stack(pictures)


def clip_report(clip: Network, sets: int = 8, hard: int = 64) -> Report:
    """Top 1 of 64 held-out scenes both ways, and of hard sets whose scenes differ in one thing.

    A hard set is a scene and one variant per kind of change, each caption choosing among all; "object alone" and the
    like let the scene and that variant choose among the two of them.
    """
    scenes = held_out_scenes(clip.config, clip.extra.get("concepts", ()))
    renderer = Renderer()
    easy = distinct_sets(scenes, sets)
    captions, pictures = _embed_sets(clip, easy, renderer, f"sets of {SET}")
    figures: Figures = {
        f"caption to picture, 1 of {SET}": {"top 1": top1(captions, pictures), "chance": 1 / SET},
        f"picture to caption, 1 of {SET}": {"top 1": top1(pictures, captions), "chance": 1 / SET},
    }
    for what, single, kinds in (("two objects", 0.0, PAIR_KINDS), ("one object", 1.0, SINGLE_KINDS)):
        chosen = hard_sets(replace(scenes, single_fraction=single), kinds, hard)
        figures |= hard_figures(*_embed_sets(clip, chosen, renderer, f"hard sets, {what}"), what, kinds)
    return Report(figures, _nearest(captions[0], pictures[0], easy[0], renderer))


def hard_figures(
    captions: Float[np.ndarray, "s n z"], pictures: Float[np.ndarray, "s n z"], what: str, kinds: Sequence[str]
) -> Figures:
    """Top 1 in sets of a scene and one variant per kind: among all of them, and between the scene and one variant."""
    figures = {f"{what}, hard sets": {"top 1": top1(captions, pictures), "chance": 1 / captions.shape[1]}}
    for place, kind in enumerate(kinds, start=1):
        two = [0, place]
        figures[f"{what}, {kind} alone"] = {"top 1": top1(captions[:, two], pictures[:, two]), "chance": 0.5}
    return figures


def prior_report(clip: Network, prior: Network, sets: int = 4, seed: int = 0, options: Options = RECOMMENDED) -> Report:
    """Top 1 of 64 held-out pictures by the prior's embedding of each caption, and its cosine to the true embedding.

    Beside them the same of the text embedding, of another caption's prior embedding and of the mean image embedding;
    and milliseconds of this machine per caption, once the prior is compiled.
    """
    chosen = distinct_sets(held_out_scenes(clip.config, clip.extra.get("concepts", ())), sets)
    null = encode_captions(clip, [""])
    renderer = Renderer()
    rows = []
    for number, scenes in enumerate(tqdm(chosen, desc=f"sets of {SET}", unit="set", dynamic_ncols=True)):
        text = encode_captions(clip, [scene.caption for scene in scenes])
        keys = picture_keys(seed + number * SET, len(scenes))
        made = np.asarray(prior_embeddings(prior, keys, text, null, options))
        true = embed_pictures(clip, np.stack([renderer.render(scene) for scene in scenes]))
        rows.append((made, unit(np.asarray(text.embedding)), true))
    start = time.perf_counter()
    prior_embeddings(prior, keys, text, null, options).block_until_ready()
    milliseconds = 1e3 * (time.perf_counter() - start) / SET
    made, text, true = (np.stack(column) for column in zip(*rows, strict=True))
    mean = (prior.constants.get("whitening") or prior.constants["quantiser"])["mean"]
    figures = {
        "the prior's embedding": {
            "top 1": top1(made, true),
            "cosine": mean_cosine(made, true),
            "ms per caption": milliseconds,
        },
        "the text embedding": {"top 1": top1(text, true), "cosine": mean_cosine(text, true)},
        "another caption's prior embedding": {"cosine": mean_cosine(np.roll(made, 1, axis=1), true)},
        "another picture's true embedding": {"cosine": mean_cosine(np.roll(true, 1, axis=1), true)},
        "the mean embedding": {"cosine": mean_cosine(np.asarray(mean), true)},
        "chance": {"top 1": 1 / SET},
    }
    return Report(figures, _nearest(made[0], true[0], chosen[0], renderer))


def _nearest(
    queries: Float[np.ndarray, "n z"], keys: Float[np.ndarray, "n z"], scenes: Sequence[Scene], renderer: Renderer
) -> tuple[UInt8[np.ndarray, "c h w 3"], ...]:
    """Rows of the true picture and those nearest to its query."""
    order = np.argsort(-queries @ keys.T, axis=1)[:SHOWN, :NEAREST]
    return tuple(
        np.stack([renderer.render(scenes[i]) for i in (place, *nearest)]) for place, nearest in enumerate(order)
    )
