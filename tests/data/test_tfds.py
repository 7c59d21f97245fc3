import subprocess
import sys

import grain
import numpy as np
import pytest

from unclip_jax.config import DataConfig
from unclip_jax.data.emoji import Renderer, Scenes
from unclip_jax.data.loader import EmojiSource
from unclip_jax.data.tfds_emoji import EmojiScenes, EmojiScenesConfig, data_source, read_example

WRITE = """
import sys
from unclip_jax.data.tfds_emoji import EmojiScenes, EmojiScenesConfig, data_source
from unclip_jax.config import DataConfig
builder = EmojiScenes(config=EmojiScenesConfig(name="eight", train=8, held_out=2), data_dir=sys.argv[1])
builder.download_and_prepare()
assert data_source(builder.data_dir, DataConfig())[7]["image"].shape == (64, 64, 3)
assert not [name for name in sys.modules if name.split(".")[0] in ("tensorflow", "torch")]
print(builder.data_dir)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Eight training scenes, written by a process of its own that must get by without TensorFlow."""
    place = tmp_path_factory.mktemp("tfds")
    done = subprocess.run([sys.executable, "-c", WRITE, str(place)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_what_is_read_is_what_was_drawn(folder):
    renderer = Renderer()
    for split, count in (("train", 8), ("held_out", 2)):
        source, scenes = data_source(folder, DataConfig(), split), Scenes(split=split)
        assert len(source) == count
        for index in range(count):
            scene, picture = read_example(source.examples[index])
            assert scene == scenes[index] and source.examples[index]["index"] == index
            assert picture.dtype == np.uint8 and np.array_equal(picture, renderer.render(scene))


def test_files_are_array_record(folder):
    from pathlib import Path

    assert sorted(path.name.split(".")[1].split("-")[0] for path in Path(folder).glob("emoji*")) == ["array_record"] * 2


def test_records_feed_the_loader(folder):
    config = DataConfig(batch_size=4)
    read = list(grain.MapDataset.source(data_source(folder, config)).batch(4))
    drawn = EmojiSource(config)
    assert len(read) == 2
    for index in range(8):
        for name, column in drawn[index].items():
            assert np.array_equal(read[index // 4][name][index % 4], column)


def test_stored_pictures_are_cut_like_drawn_ones(tmp_path):
    builder = EmojiScenes(config=EmojiScenesConfig(name="large", size=256, train=2, held_out=1), data_dir=tmp_path)
    builder.download_and_prepare()
    config = DataConfig(size=256, crop=64, low_size=64, degradation="bsr")
    stored, drawn = data_source(builder.data_dir, config), EmojiSource(config)
    for index in range(2):
        assert all(np.array_equal(stored[index][name], column) for name, column in drawn[index].items())
    with pytest.raises(ValueError, match="256 px.* 64 px"):
        data_source(builder.data_dir, DataConfig())


def test_sizes_and_notices():
    assert {config.name: config.size for config in EmojiScenes.BUILDER_CONFIGS} == {
        "64px": 64,
        "256px": 256,
        "1024px": 1024,
    }


def test_the_licence_travels_with_the_files(folder):
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(folder).info
    assert "OpenMoji" in info.citation and "CC BY-SA 4.0" in info.citation
    assert "creativecommons.org/licenses/by-sa/4.0" in str(info.redistribution_info) or "CC BY-SA" in str(info.as_proto)
