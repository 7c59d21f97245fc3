"""Files mapped into memory: arrays that are read when they are used, and headers that cannot ask for too much."""

import mmap
from pathlib import Path

import numpy as np

from unclip_jax.checkpoint.schema import CheckpointError

MAX_READ = (
    16 * 1024**2
)  # bytes of a pickle or of a zip's directory; that of a network of 3 billion parameters is under 1 MB


class MappedFile(mmap.mmap):
    """A file mapped for reading, whose sequential reads are bounded; slices and arrays over it are not."""

    def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes from the position on; ValueError where more than MAX_READ are asked for."""
        size = len(self) - self.tell() if n is None or n < 0 else n
        if size > MAX_READ:
            raise ValueError(f"it asks for {size} bytes of header at once")
        return super().read(size)

    def readline(self) -> bytes:
        """The bytes up to a newline; ValueError where there is none within MAX_READ bytes."""
        end = self.find(b"\n", self.tell(), self.tell() + MAX_READ)
        if end < 0:
            raise ValueError("it has a line without an end")
        return super().read(end + 1 - self.tell())


def map_file(path: Path) -> MappedFile:
    """The file at `path`; CheckpointError where it is absent, empty or only a pointer to the real one."""
    if not path.is_file():
        raise CheckpointError(f"there is no weights file '{path}': check the path")
    try:
        with path.open("rb") as file:
            mapping = MappedFile(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read ({error}): check it, or fetch it again") from error
    if mapping[:24] == b"version https://git-lfs.":
        raise CheckpointError(f"'{path}' is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
    return mapping


def view(
    mapping: MappedFile, dtype: np.dtype, shape: tuple[int, ...], offset: int, strides: tuple[int, ...] | None = None
) -> np.ndarray:
    """A read-only array over the mapping, nothing read yet; offset and strides in bytes.

    Raises ValueError where it does not lie within the file.
    """
    return np.ndarray(shape, dtype, mapping, offset, strides)
