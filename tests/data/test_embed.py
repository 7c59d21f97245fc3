import json
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from unclip_jax import run
from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.cli import main
from unclip_jax.config import ClipConfig, DataConfig, TrainConfig
from unclip_jax.data.embed import Cut, Encoders, embed
from unclip_jax.data.embeddings import EmbeddingsError, Part, open_embeddings, shard_path, unit
from unclip_jax.data.records import Broken, Record
from unclip_jax.data.tokenizer import ClipTokenizer

ROWS, DIM, SIDE = 23, 6, 8
CUT = Cut(shard_rows=5, mirror=True, thumbnail=4)
PROJECTION = np.random.default_rng(0).standard_normal((SIDE * SIDE * 3, DIM)).astype(np.float32)


class Pictures:
    """Noise with one to three captions each; some are broken."""

    problems = ()

    def __init__(self, rows: int = ROWS, broken: Sequence[int] = ()) -> None:
        self.name, self.digest, self.rows, self.broken = "noise", f"noise-{rows}", rows, broken

    def __len__(self) -> int:
        return self.rows

    def key(self, index: int) -> str:
        return f"picture {index}"

    def __getitem__(self, index: int) -> Record:
        if index in self.broken:
            raise Broken(f"'{self.key(index)}' is truncated")
        picture = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE + index % 3, 3), np.uint8)
        return Record(self.key(index), picture, tuple(f"caption {n}" for n in range(1 + index % 3)))


def encoders(stop_after: int | None = None, digest: str = "clip") -> tuple[Encoders, list[int]]:
    """Linear towers that note the size of every batch of pictures, and raise after so many."""
    seen: list[int] = []

    def image(pixels: np.ndarray) -> np.ndarray:
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(len(pixels))
        return unit(pixels.reshape(len(pixels), -1) @ PROJECTION)

    def text(captions: list[str]) -> np.ndarray:
        return np.asarray([[len(caption)] * DIM for caption in captions], np.float32)

    return Encoders(image, text, SIDE, DIM, digest), seen


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tmp"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    embed(Pictures(), encoders()[0], folder, cut=CUT, batch=4)
    return folder


def test_rows_are_the_records_in_order(whole):
    embeddings = open_embeddings(whole, "clip")
    rows = np.asarray([22, 0, 7, 7, 5])
    side = [np.asarray(Image.fromarray(Pictures()[int(i)].image))[:, (i % 3) // 2 :][:, :SIDE] for i in rows]
    assert len(embeddings) == ROWS and embeddings.valid.all()
    assert embeddings.keys(rows) == [f"picture {i}" for i in rows]
    np.testing.assert_array_equal(embeddings.rows("size", rows), [(SIDE, SIDE + i % 3) for i in rows])
    expected = unit(np.stack(side).reshape(5, -1) @ PROJECTION)
    np.testing.assert_allclose(embeddings.unit("image", rows), expected, atol=2e-3)
    mirrored = unit(np.stack(side)[:, :, ::-1].reshape(5, -1) @ PROJECTION)
    np.testing.assert_allclose(embeddings.unit("mirror", rows), mirrored, atol=2e-3)
    for number in range(embeddings.about.shards):
        arrays = embeddings.shard(number).arrays
        assert np.diff(arrays["captions"]).tolist() == [1 + i % 3 for i in range(number * 5, min(ROWS, number * 5 + 5))]
        assert len(arrays["text"]) == arrays["captions"][-1]


@pytest.mark.parametrize("stop_after", range(1, 19, 4))
def test_killed_and_resumed_equals_whole_and_does_nothing_twice(whole, tmp_path, stop_after):
    first, seen = encoders(stop_after)
    with pytest.raises(KeyboardInterrupt):
        embed(Pictures(), first, tmp_path, cut=CUT, batch=4)
    made = len(list(tmp_path.glob("shard-*.safetensors")))
    assert made == stop_after // 4  # two batches of five rows, each also mirrored
    (tmp_path / ".shard-00004.safetensors.1.tmp").write_bytes(b"half of it")
    second, again = encoders()
    done = embed(Pictures(), second, tmp_path, cut=CUT, batch=4)
    assert (done.found, done.made) == (made, 5 - made)
    assert len(again) == 4 * done.made - 2 * (made < 5)  # the last shard's three rows are one batch
    assert files(tmp_path) == files(whole)


def test_parts_share_the_shards_out(whole, tmp_path):
    for index in (1, 0, 2):
        assert embed(Pictures(), encoders()[0], tmp_path, cut=CUT, batch=4, part=Part(index, 3)).found == 0
    assert files(tmp_path) == files(whole)


def test_broken_records_are_named_and_marked(tmp_path):
    done = embed(Pictures(broken=(3, 11)), encoders()[0], tmp_path, cut=CUT, batch=4, most_broken=0.3)
    assert done.broken == [(f"picture {n}", f"'picture {n}' is truncated") for n in (3, 11)]
    embeddings = open_embeddings(tmp_path)
    assert np.flatnonzero(~embeddings.valid).tolist() == [3, 11]
    assert not embeddings.rows("image", np.asarray([3, 11])).any()
    again = embed(Pictures(broken=(3, 11)), encoders()[0], tmp_path, cut=CUT, batch=4, most_broken=0.3)
    assert (again.made, again.broken) == (0, done.broken)


def refused(source, encoders_, folder, **options) -> str:
    with pytest.raises(EmbeddingsError) as error:
        embed(source, encoders_, folder, **{"cut": CUT, "batch": 4} | options)
    return str(error.value)


def test_bad_input_is_one_sentence(whole, tmp_path):
    clip, other = encoders()[0], encoders(digest="other")[0]
    assert "another clip (clip, now other): choose a new folder" in refused(Pictures(), other, whole)
    assert "another shard_rows (5, now 6)" in refused(Pictures(), clip, whole, cut=Cut(6, mirror=True, thumbnail=4))
    assert "another digest" in refused(Pictures(22), clip, whole)
    assert "no records" in refused(Pictures(0), clip, tmp_path)
    assert "2 of 5 records are broken" in refused(Pictures(broken=(0, 1)), clip, tmp_path / "a")
    with pytest.raises(EmbeddingsError, match="holds no embeddings"):
        open_embeddings(tmp_path)
    embed(Pictures(), clip, tmp_path / "b", cut=CUT, part=Part(0, 2))
    with pytest.raises(EmbeddingsError, match="lacks 2 of its 5 shards"):
        open_embeddings(tmp_path / "b")
    with pytest.raises(EmbeddingsError, match="made with the CLIP clip, not with other"):
        open_embeddings(whole, "other")
    shard_path(tmp_path / "b", 0).write_bytes(b"\0" * 9)
    assert "delete it" in refused(Pictures(), clip, tmp_path / "b")
    for text in ("1/1", "a/2", "2", "-1/2"):
        with pytest.raises(ValueError, match="counted from 0"):
            Part.parse(text)


def test_the_command_embeds_a_folder_with_a_cascades_clip(tiny_cascade_folder, tmp_path, capsys):
    from unclip_jax.cascade import load_clip
    from unclip_jax.data.records import open_source
    from unclip_jax.evaluate.retrieval import embed_pictures

    place = tmp_path / "pictures"
    place.mkdir()
    pictures = np.random.default_rng(1).integers(0, 256, (5, 64, 64, 3), np.uint8)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text("a red cat")
    (place / "5.png").write_bytes(b"no picture")
    (place / "5.txt").write_text("nothing")
    out = tmp_path / "embeddings"
    command = ["data", "embed", f"folder:{place}", "--out", str(out), "--clip", str(tiny_cascade_folder)]
    assert main([*command, "--batch", "4", "--shard-rows", "4", "--most-broken", "0.5", "--part", "0/1"]) == 0
    assert "2 shards made, 0 were there" in capsys.readouterr().out
    (line,) = (out / "broken-0-of-1.jsonl").read_text().splitlines()
    assert "5" in json.loads(line)["key"]
    clip = load_clip(tiny_cascade_folder)
    expected = embed_pictures(clip, pictures[:4])
    np.testing.assert_allclose(open_embeddings(out, clip.digest).rows("image", np.arange(4)), expected, atol=1e-3)
    stored = open_source(f"stored:{out}")[0]
    assert stored.captions == ("a red cat",) and stored.embedding is not None
    np.testing.assert_allclose(stored.embedding, expected[0], atol=1e-3)


def test_embeddings_that_training_makes_follow_the_content_of_its_files(tmp_path, monkeypatch):
    def made(path, *_):
        np.savez(path, embedding=np.zeros((1, 2)), tokens=np.zeros((1, 2), int), mask=np.ones((1, 2), bool))

    monkeypatch.setattr(run, "_embed_to", made)
    clip = Network(TrainConfig("clip", ClipConfig()), {}, {}, None, "digest", {})
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"

    def count(**files) -> int:
        run._embed(DataConfig(**{name: str(path) for name, path in files.items()}), clip, tokenizer, 1, tmp_path)
        return len(list(tmp_path.glob("embeddings-*.npz")))

    tokenizer = ClipTokenizer(8)
    for path in (one, two):
        path.write_text("key,weight\na,1\n")
    assert [count(weights=one), count(weights=two), count(weights=one, skip=one)] == [1, 1, 2]
    one.write_text("key,weight\na,2\n")
    assert [count(weights=one), count(weights=two)] == [3, 3]
