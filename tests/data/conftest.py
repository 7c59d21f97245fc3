import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COUNT = 12


def jpeg(picture: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory) -> Path:
    """What sources find out goes here, not into the user's cache."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("cache")
    patch.setenv("UNCLIP_CACHE_DIR", str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope="session")
def pictures() -> list[tuple[bytes, list[str]]]:
    """Twelve JPEGs of several shapes, smooth enough to look like pictures, each with two captions."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(COUNT):
        small = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
        side = (96 + 16 * (number % 3), 96)
        found.append(
            (jpeg(np.asarray(small.resize(side, Image.Resampling.BICUBIC))), [f"thing {number}", f"a {number}"])
        )
    return found


@pytest.fixture(scope="session")
def folder(pictures, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("folder")
    for number, (data, captions) in enumerate(pictures):
        (place / f"{number:03d}.jpg").write_bytes(data)
        (place / f"{number:03d}.txt").write_text("\n".join(captions))
    return place


@pytest.fixture(scope="session")
def tars(pictures, tmp_path_factory) -> Path:
    """Two tars as img2dataset writes them."""
    place = tmp_path_factory.mktemp("tars")
    for shard in range(2):
        with tarfile.open(place / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                data, captions = pictures[number]
                add(tar, f"{number:09d}.jpg", data)
                add(tar, f"{number:09d}.txt", "\n".join(captions).encode())
                add(tar, f"{number:09d}.json", json.dumps({"caption": captions[0], "key": f"{number:09d}"}).encode())
    return place
