"""The same pictures, however they are stored, are the same records and the same batches."""

import csv
import json
import pickle
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from unclip_jax.config import DataConfig
from unclip_jax.data.loader import batches
from unclip_jax.data.records import DataError, open_source


def of_csv(place: Path, pictures) -> str:
    for number, (data, _) in enumerate(pictures):
        (place / f"{number}.jpg").write_bytes(data)
    with (place / "t.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        table.writerows([f"{number}.jpg", captions[0]] for number, (_, captions) in enumerate(pictures))
    return f"table:{place}/t.csv"


def of_jsonl(place: Path, pictures) -> str:
    of_csv(place, pictures)
    lines = [json.dumps({"picture": f"{n}.jpg", "words": words}) for n, (_, words) in enumerate(pictures)]
    (place / "t.jsonl").write_text("\n".join(lines))
    return f"table:{place}/t.jsonl?image=picture&caption=words"


def of_parquet(place: Path, pictures) -> str:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    image = [{"bytes": data, "path": None} for data, _ in pictures]
    parquet.write_table(pa.table({"image": image, "captions": [words for _, words in pictures]}), place / "t.parquet")
    return f"table:{place}/t.parquet"


def of_tfds(place: Path, pictures) -> str:
    import io

    import tensorflow_datasets as tfds

    class Things(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = tfds.core.Path(__file__)

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
            features = tfds.features.FeaturesDict(
                {"image": image, "captions": tfds.features.Sequence(tfds.features.Text())}
            )
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, (data, words) in enumerate(pictures):
                yield number, {"image": io.BytesIO(data), "captions": words}

    builder = Things(data_dir=str(place), file_format="array_record")
    builder.download_and_prepare()
    return f"tfds:{builder.data_path}:train"


def of_hub(place: Path, pictures) -> str:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": data, "path": None} for data, _ in pictures], "text": [words for _, words in pictures]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Sequence(datasets.Value("string"))})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(place / "hub"))
    return f"hf:{place}/hub"


KINDS = {"csv": of_csv, "jsonl": of_jsonl, "parquet": of_parquet, "tfds": of_tfds, "hub": of_hub}


def run(source: str, **options) -> list:
    config = DataConfig(source=source, batch_size=5, size=32, context_length=8, workers=0, seed=2, **options)
    return list(islice(batches(config), 6))


@pytest.mark.parametrize("kind", ["tars", *KINDS])
def test_same_pictures_same_batches(kind, folder, tars, pictures, tmp_path):
    spec = f"tar:{tars}/*.tar" if kind == "tars" else KINDS[kind](tmp_path, pictures)
    source, known = open_source(spec), open_source(f"folder:{folder}")
    assert len(source) == len(known) == len(pictures) and source.problems == ()
    assert len({source.key(index) for index in range(len(source))}) == len(source)
    several = kind != "csv"  # which has one caption per row
    for index, (data, captions) in enumerate(pictures):
        record = source[index]
        assert record.key == source.key(index) and record.image == data == known[index].image
        assert record.captions == tuple(captions if several else captions[:1])
    for a, b in zip(run(spec), run(f"folder:{folder}"), strict=True):
        assert np.array_equal(a.image, b.image) and (not several or np.array_equal(a.tokens, b.tokens))
    packed = pickle.dumps(source)
    assert len(packed) < 2000 and pickle.loads(packed)[7].image == pictures[7][0]


def test_digests_follow_the_content(folder, tmp_path):
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    one = open_source(f"folder:{copy}").digest
    assert one == open_source(f"folder:{copy}").digest
    (copy / "003.txt").write_text("another caption")
    two = open_source(f"folder:{copy}").digest
    (copy / "004.jpg").unlink()
    three = open_source(f"folder:{copy}")
    assert len({one, two, three.digest}) == 3 and len(three) == 11


def test_emoji_are_a_source_too():
    source = open_source("emoji?size=128&count=20")
    record = source[3]
    assert len(source) == 20 and record.image.shape == (128, 128, 3) and len(record.captions) == 1
    assert pickle.loads(pickle.dumps(source))[3].captions == record.captions


def test_tars_read_from_one_file_or_many(tars, pictures):
    assert len(open_source(f"tar:{tars}/{{00000..00001}}.tar")) == 12
    second = open_source(f"tar:{tars}/00001.tar")
    assert [second[index].image for index in range(6)] == [data for data, _ in pictures[6:]]


def test_long_names_and_the_json_caption(tmp_path, pictures):
    from .conftest import add

    name = "deep/" * 60 + "x"
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
            add(tar, f"{name}.jpg", pictures[0][0])
            add(tar, f"{name}.json", b'{"caption": "told by json"}')
        record = open_source(f"tar:{tmp_path}/a.tar")[0]
        assert record.key == f"a/{name}" and record.captions == ("told by json",) and record.image == pictures[0][0]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("pictures", "is no source of pictures: there are folder:PATH"),
        ("floder:/tmp", "no source is called 'floder'"),
        ("folder:/there/is/none", "there is no folder"),
        ("folder:{empty}", "holds no pictures"),
        ("folder:{empty}?image=x", "has no option 'image'"),
        ("table:{empty}/none.csv", "there is no table"),
        ("tar:{empty}/*.tar", "there is no file"),
        ("tfds:{empty}", "names no split"),
        ("mix:folder:{empty}", "is no part of a mixture"),
        ("stored:{empty}", "holds no embeddings"),
    ],
)
def test_wrong_specs_are_refused_in_one_sentence(tmp_path, spec, said):
    with pytest.raises(DataError, match=said) as refused:
        open_source(spec.format(empty=tmp_path))
    assert "\n" not in str(refused.value)
