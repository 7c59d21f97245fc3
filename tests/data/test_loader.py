from itertools import islice

import numpy as np
import pytest

from unclip_jax.config import DataConfig
from unclip_jax.data.degrade import area_downsample
from unclip_jax.data.emoji import Renderer
from unclip_jax.data.loader import EmojiSource, batches, scenes_of, tokenizer_of
from unclip_jax.types import Batch

PLAIN = DataConfig(batch_size=6, seed=3)
CROPS = DataConfig(batch_size=4, size=256, crop=64, low_size=64, seed=3)


def equal(a: Batch, b: Batch) -> bool:
    return all(
        (x is None and y is None) or (x is not None and y is not None and np.array_equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def take(config: DataConfig, count: int, **options) -> list[Batch]:
    return list(islice(batches(config, **options), count))


@pytest.mark.parametrize("config", [PLAIN, CROPS])
def test_a_batch_depends_on_its_step_alone(config):
    run = take(config, 5)
    assert equal(take(config, 1, start=3)[0], run[3])
    assert all(equal(a, b) for a, b in zip(run, take(config, 5, threads=4, buffer=8), strict=True))
    assert not equal(run[0], run[1])
    far = take(config, 1, start=10**9)[0]
    assert len(far.image) == config.batch_size


def test_records_are_pictures_and_their_captions():
    batch = take(PLAIN, 3)[2]
    scenes, tokenizer, renderer = scenes_of(PLAIN), tokenizer_of(PLAIN), Renderer()
    assert batch.image.shape == (6, 64, 64, 3) and batch.image.dtype == np.uint8
    assert batch.tokens.shape == batch.mask.shape == (6, 32) and batch.low is None and batch.embedding is None
    for row in range(6):
        scene = scenes[2 * 6 + row]
        assert np.array_equal(batch.image[row], renderer.render(scene))
        assert np.array_equal(batch.tokens[row], tokenizer.encode([scene.caption]).ids[0])


def test_crops_lie_on_the_low_resolution_grid():
    source, scenes, renderer = EmojiSource(CROPS), scenes_of(CROPS), Renderer()
    places = set()
    for index in range(24):
        record = source[index]
        assert record["image"].shape == (64, 64, 3) and record["low"].shape == (16, 16, 3)
        assert np.array_equal(area_downsample(record["image"], 4), record["low"])
        whole = renderer.render(scenes[index], 256)
        windows = np.lib.stride_tricks.sliding_window_view(whole, (64, 64, 3))[::4, ::4, 0]
        found = np.argwhere((windows == record["image"]).all((2, 3, 4)))
        assert len(found)
        # The same part of the whole small picture.
        y, x = found[0]
        assert np.array_equal(area_downsample(whole, 4)[y : y + 16, x : x + 16], record["low"])
        assert record["image"].std((0, 1)).max() > 0  # crops touch an object
        places.add((int(y), int(x)))
    assert len(places) > 12


@pytest.mark.parametrize("degradation", ["blur", "bsr"])
def test_degraded_pictures_stay_aligned(degradation):
    from dataclasses import replace

    clean, corrupted = EmojiSource(CROPS), EmojiSource(replace(CROPS, degradation=degradation))
    for index in range(6):
        a, b = clean[index], corrupted[index]
        assert np.array_equal(a["image"], b["image"]) and not np.array_equal(a["low"], b["low"])
        assert np.array_equal(b["low"], corrupted[index]["low"])
        x, y = (z["low"].astype(float).ravel() for z in (a, b))
        assert np.corrcoef(x, y)[0, 1] > 0.9


def test_whole_pairs_have_no_crop():
    record = EmojiSource(DataConfig(size=256, low_size=64))[0]
    assert record["image"].shape == (256, 256, 3) and record["low"].shape == (64, 64, 3)


def test_splits_and_seeds_differ():
    held_out = take(PLAIN, 1, split="held_out")[0]
    other = take(DataConfig(batch_size=6, seed=4), 1)[0]
    assert not equal(take(PLAIN, 1)[0], held_out) and not equal(take(PLAIN, 1)[0], other)


def test_redrawn_pictures_go_with_their_part_of_the_large_one():
    scenes, renderer = scenes_of(CROPS), Renderer()
    low = np.stack([area_downsample(renderer.render(scenes[i], 256), 4) for i in range(6)])
    source, plain = EmojiSource(CROPS, redrawn=low), EmojiSource(CROPS)
    seen = set()
    for index in range(32):
        record = source[index]
        if index % 2 == 0:
            assert all(np.array_equal(record[name], plain[index][name]) for name in record)
            continue
        np.testing.assert_array_equal(record["low"], area_downsample(record["image"], 4))
        seen.add(record["tokens"].tobytes())
    assert len(seen) == len({plain.tokenizer.encode([scenes[i].caption]).ids.tobytes() for i in range(6)})
