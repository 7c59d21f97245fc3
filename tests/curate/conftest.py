import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def store():
    """Writes a folder of embeddings as `unclip data embed` does, of given arrays, and opens it."""
    from unclip_jax.checkpoint.writing import save_file
    from unclip_jax.data.embeddings import INDEX, About, open_embeddings, shard_metadata, shard_path

    def write(folder: Path, image: np.ndarray, shard_rows: int = 256, clip: str = "clip", **arrays: np.ndarray):
        """arrays: mirror, thumbnail, size, valid, and text, of one caption each."""
        rows, dim = image.shape
        thumbnail = arrays["thumbnail"].shape[1] if "thumbnail" in arrays else 0
        about = About("made up", "digest", clip, rows, shard_rows, dim, "float16", "mirror" in arrays, thumbnail)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).write_text(json.dumps(about._asdict()))
        whole = {"image": image, "text": image, "size": np.ones((rows, 2), np.int32), "valid": np.ones(rows, bool)}
        whole |= arrays
        for name in ("image", "text", "mirror"):
            if name in whole:
                whole[name] = whole[name].astype(np.float16)
        for number in range(about.shards):
            part = slice(number * shard_rows, (number + 1) * shard_rows)
            tensors = {name: array[part] for name, array in whole.items()}
            tensors["captions"] = np.arange(len(tensors["image"]) + 1)
            keys = json.dumps([f"key {row:05d}" for row in range(rows)[part]])
            metadata = shard_metadata(about, number) | {"keys": keys, "broken": "[]"}
            save_file(tensors, shard_path(folder, number), metadata)
        return open_embeddings(folder)

    return write
