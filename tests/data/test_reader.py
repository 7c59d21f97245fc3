"""Rows do not depend on who reads them, nor on where a run began; captions, crops, skip lists and weights as told."""

import warnings
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from unclip_jax.config import DataConfig
from unclip_jax.data.degrade import area_downsample
from unclip_jax.data.loader import batches, tokenizer_of
from unclip_jax.data.reader import Rows, choose, read
from unclip_jax.data.records import DataError
from unclip_jax.types import Batch


def config(source, **options) -> DataConfig:
    chosen = {"batch_size": 8, "size": 32, "context_length": 8, "workers": 0, "seed": 2} | options
    return DataConfig(source=f"folder:{source}", **chosen)


def take(data: DataConfig, count: int, **options) -> list[Batch]:
    return list(islice(batches(data, **options), count))


def equal(a: Batch, b: Batch) -> bool:
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def whole(folder) -> list[Batch]:
    return take(config(folder), 5)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_the_same_global_batches(folder, whole, hosts):
    rows = np.random.default_rng(hosts).permutation(8).reshape(hosts, -1)  # slices deal rows out in odd orders
    parts = [take(config(folder), 5, rows=np.sort(own)) for own in rows]
    for step, batch in enumerate(whole):
        together = Batch(*(None if column is None else np.zeros_like(column) for column in batch))
        for own, part in zip(rows, parts, strict=True):
            for column, piece in zip(together[:3], part[step][:3], strict=True):
                column[np.sort(own)] = piece
        assert equal(together, batch)


@pytest.mark.parametrize("start", [1, 3, 4])
def test_a_run_that_goes_on_reads_what_it_would_have(folder, whole, start):
    assert equal(take(config(folder), 1, start=start)[0], whole[start])


def test_processes_and_threads_change_nothing(folder, whole):
    with_process = take(config(folder, workers=1), 4)
    chosen = choose(config(folder))
    with_threads = list(islice(read(config(folder), chosen, tokenizer_of(config(folder)), threads=4, buffer=6), 4))
    for batch, other, third in zip(whole, with_process, with_threads, strict=False):
        assert equal(batch, other) and equal(batch, third)


def test_every_picture_once_an_epoch(folder, whole):
    seen = Counter(picture.tobytes() for batch in whole[:3] for picture in batch.image)
    assert len(seen) == 12 and set(seen.values()) == {2}


def test_several_captions_templates_and_dropout(folder):
    tokenizer = tokenizer_of(config(folder))
    plain = {row.tobytes() for batch in take(config(folder), 15) for row in batch.tokens}
    assert plain == {row.tobytes() for n in range(12) for row in tokenizer.encode([f"thing {n}", f"a {n}"]).ids}
    told = config(folder, templates=("see {}", "no {}"), caption_drop=0.25)
    rows = [row.tobytes() for batch in take(told, 40) for row in batch.tokens]
    empty = tokenizer.encode([""]).ids[0].tobytes()
    assert 0.18 < rows.count(empty) / len(rows) < 0.32
    words = [f"{start} {caption}" for n in range(12) for caption in (f"thing {n}", f"a {n}") for start in ("see", "no")]
    assert {*rows} - {empty} <= {row.tobytes() for row in tokenizer.encode(words).ids}


def test_crops_and_their_small_pictures(folder):
    data = config(folder, size=64, crop=32, low_size=16)
    rows = Rows(data, choose(data), tokenizer_of(data), np.arange(8))
    full = Rows(config(folder, size=64), choose(data), tokenizer_of(data), np.arange(8))
    places = set()
    for number in range(16):
        row, picture = rows.row(number), full.row(number).image
        assert row.image.shape == (32, 32, 3) and np.array_equal(row.low, area_downsample(row.image, 4))
        windows = np.lib.stride_tricks.sliding_window_view(picture, (32, 32, 3))[::4, ::4, 0]
        found = np.argwhere((windows == row.image).all((2, 3, 4)))
        places.add(tuple(found[0]))
    assert len(places) > 8


def test_skipped_records_never_come(folder, tmp_path):
    skip = tmp_path / "skip.txt"
    skip.write_text("# a note\n003.jpg\tbroken\n007.jpg\nunknown.jpg\n")
    source, order = choose(config(folder, skip=str(skip)))
    keys = Counter(source[order(row)].key for row in range(100))
    assert len(source) == 10 and len(keys) == 10 and not {"003.jpg", "007.jpg"} & set(keys)
    assert set(keys.values()) == {10}
    skip.write_text("\n".join(f"{n:03d}.jpg" for n in range(12)))
    with pytest.raises(DataError, match="skips all 12 records"):
        choose(config(folder, skip=str(skip)))


def test_weights_of_files(folder, tmp_path):
    from safetensors.numpy import save_file

    from unclip_jax.data.records import open_source

    weights = np.linspace(0, 1.1, 12)
    np.save(tmp_path / "w.npy", weights)
    lines = "".join(f'{{"key": "{n:03d}.jpg", "weight": {w}}}\n' for n, w in enumerate(weights))
    (tmp_path / "w.jsonl").write_text(lines)
    (tmp_path / "w.csv").write_text("key,weight\n" + "".join(f"{n:03d}.jpg,{w}\n" for n, w in enumerate(weights)))
    digest = open_source(f"folder:{folder}").digest
    save_file({"weights": weights.astype(np.float32)}, tmp_path / "w.safetensors", {"digest": digest})
    (tmp_path / "skip.txt").write_text("011.jpg\n")
    for name in ("w.npy", "w.jsonl", "w.csv", "w.safetensors"):
        data = config(folder, weights=str(tmp_path / name), skip=str(tmp_path / "skip.txt"))
        source, order = choose(data)
        found = Counter(source.key(order(row)) for row in range(550))
        expected = {f"{n:03d}.jpg": 550 * w / weights[:11].sum() for n, w in enumerate(weights[:11])}
        assert set(found) == {f"{n:03d}.jpg" for n in range(1, 11)}
        assert all(abs(found[key] - expected[key]) < 20 for key in expected)
    save_file({"weights": weights}, tmp_path / "w.safetensors", {"digest": "another"})
    with pytest.raises(DataError, match="another list of records"):
        choose(data)


def test_mixtures_train(folder, tars, tmp_path):
    skip = tmp_path / "skip.txt"
    skip.write_text("1:00001/000000009\n0:000.jpg\n")
    data = DataConfig(
        source=f"mix:3*folder:{folder},1*tar:{tars}/00001.tar", size=16, batch_size=4, context_length=8, workers=0,
        skip=str(skip),
    )  # fmt: skip
    source, order = choose(data)
    keys = Counter(source[order(row)].key for row in range(2000))
    assert len(source) == 11 + 5 == len(keys) and "0:000.jpg" not in keys and "1:00001/000000009" not in keys
    assert abs(sum(n for key, n in keys.items() if key.startswith("0:")) / 2000 - 0.75) < 0.03
    assert take(data, 1)[0].image.shape == (4, 16, 16, 3)


def test_cut_captions_are_said(folder, monkeypatch):
    monkeypatch.setattr("unclip_jax.data.reader.FIRST", 16)
    with pytest.warns(UserWarning, match="longer than --data.context-length 3 tokens, and are cut"):
        take(config(folder, context_length=3), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(config(folder), 3)


def test_stored_embeddings_train_without_pictures(folder, tmp_path):
    from unclip_jax.data.embed import Encoders, embed
    from unclip_jax.data.reader import check_clip, stores_embeddings
    from unclip_jax.data.records import open_source

    def encode(pixels):
        return pixels.reshape(len(pixels), -1)[:, :4].astype(np.float32)

    encoders = Encoders(encode, lambda texts: np.ones((len(texts), 4), np.float32), 8, 4, "some clip")
    embed(open_source(f"folder:{folder}"), encoders, tmp_path / "e", batch=4)
    data = DataConfig(source=f"stored:{tmp_path}/e", batch_size=4, context_length=8, workers=0)
    chosen = choose(data)
    source, order = chosen
    assert stores_embeddings(source) and len(source) == 12
    batch = next(read(data, chosen, tokenizer_of(data), pictures=False))
    assert batch.image.shape == (4, 1, 1, 3) and batch.embedding.dtype == np.float32
    for row in range(4):
        assert np.array_equal(batch.embedding[row], source[order(row)].embedding)
    check_clip(source, "some clip")
    with pytest.raises(DataError, match="embeddings of another CLIP"):
        check_clip(source, "another")


def test_the_stall_counts_waiting_with_nothing_to_compute(whole):
    import time

    from unclip_jax.data.stall import Stall

    class Work:
        ready = True

        def is_ready(self) -> bool:
            return self.ready

    def slowly():
        while True:
            time.sleep(0.02)
            yield batch

    batch = whole[0]
    reader, work = Stall(slowly()), Work()
    next(reader)  # the first batch waits for processes to start
    reader.work = work
    assert next(reader) is batch and reader.share() > 0.5
    work.ready = False
    next(reader)
    assert reader.share() == 0
