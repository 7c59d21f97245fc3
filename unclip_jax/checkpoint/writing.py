"""Safetensors files and folders, written one tensor at a time; each appears whole or not at all."""

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.sources import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """An array that is made whenever it is used, and kept by nobody.

    read: gives it in this shape, in a dtype that is cast to this one. It stands wherever a tree has arrays to save.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The array itself, for numpy."""
        return np.asarray(self.read(), self.dtype if dtype is None else dtype)


def host(array: Any) -> np.ndarray:
    """An array of numpy or jax, or a Tensor, as numpy's; jax keeps no copy of it on the host, as np.asarray has it."""
    if isinstance(array, jax.Array) and array.is_fully_replicated:
        array = array.addressable_data(0)
    return np.asarray(array)


def save_file(tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, of which one tensor at a time is in memory.

    tensors: arrays of numpy, or Tensors. They are in the order that the safetensors library chooses: wide dtypes first,
    so that all are aligned, and then by name.
    """
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = np.dtype(tensors[name].dtype), tensors[name].shape
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path`; the file there takes its place where the block ends well, and goes away where it does not.

    Raises CheckpointError where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(write_failure(path, error)) from error
    finally:
        if temporary.exists():
            temporary.unlink()


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """An empty folder beside `out`, which becomes `out` where the block ends well and goes away where it does not.

    Raises CheckpointError where `out` is there already with something in it, or cannot be written.
    """
    out = Path(out).absolute()
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise CheckpointError(f"'{out}' is there already: choose a folder that is new or empty")
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(write_failure(out, error)) from error
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(temporary), str(out))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a table of settings, in a folder that is made for it, as the hub's clients lay them out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_failure(path: str | Path, error: Exception) -> str:
    """One sentence for an error of writing, whether the library or the system reports it."""
    if "No space left" in str(error) or "os error 28" in str(error):
        return f"cannot save '{path}': the disk is full; free some space and save again (nothing saved before is lost)"
    return f"cannot save '{path}': {error}; choose a folder that can be written"
