"""Ranges of bytes of files, local or in a bucket (gs://, s3://, whatever fsspec opens), which is asked again."""

import glob
import os
import re
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from unclip_jax.data.records import Broken, DataError

TRIES = 4
DEADLINE = 30.0  # seconds of one try: a server may take a connection and then say nothing
PAUSE = 1.0  # seconds before the second try, twice as many before each further one

Result = TypeVar("Result")


class File(NamedTuple):
    """A file: path or address, bytes, and what changes when it is written anew."""

    path: str
    size: int
    version: str


def is_remote(path: str) -> bool:
    """Whether a path is an address such as gs://bucket/name."""
    return "://" in path


def find(pattern: str) -> list[File]:
    """The files of a pattern with *, ?, [..] and {000..127}, sorted; DataError where one of a range is not there."""
    files: set[File] = set()
    for one in _braces(pattern):
        found = _find_remote(one) if is_remote(one) else _find_local(one)
        if not found:
            raise DataError(f"there is no file '{one}'" + (f" of '{pattern}'" if one != pattern else ""))
        files.update(found)
    return sorted(files)


def _braces(pattern: str) -> list[str]:
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found[1], found[2]
    if int(last) - int(first) > 1_000_000:
        raise DataError(f"'{pattern}' names more than a million files")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [one for n in range(int(first), int(last) + 1) for one in _braces(f"{head}{n:0{len(first)}}{tail}")]


def _find_local(pattern: str) -> list[File]:
    paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    found = ((path, os.stat(path)) for path in paths if os.path.isfile(path))
    return [File(os.path.abspath(path), stat.st_size, str(stat.st_mtime_ns)) for path, stat in found]


def _find_remote(pattern: str) -> list[File]:
    protocol = pattern.partition("://")[0]

    def ask() -> dict[str, dict[str, Any]]:
        filesystem, path = _filesystem(pattern), pattern
        if re.search(r"[*?\[]", path.partition("://")[2]):
            return filesystem.glob(path, detail=True)
        return {path: filesystem.info(path)}

    told = _insist(ask, pattern)
    names = ("etag", "ETag", "generation", "mtime", "LastModified", "updated")
    return [
        File(
            name if is_remote(name) else f"{protocol}://{name}",
            int(info.get("size") or 0),
            " ".join(str(info[key]) for key in names if key in info),
        )
        for name, info in told.items()
        if info.get("type", "file") == "file"
    ]


@cache
def _filesystem(address: str) -> Any:
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(address)[0]
    except (ImportError, ValueError) as error:
        raise DataError(f"'{address}' needs a package: pip install 'unclip-jax[data]' ({error})") from error


def read(path: str, start: int, size: int) -> bytes:
    """Some bytes of a file.

    Raises Broken where a local file is gone or shorter, DataError where a bucket does not answer after TRIES tries.
    """
    if is_remote(path):
        data = _insist(lambda: _filesystem(path).cat_file(path, start=start, end=start + size), path)
    else:
        try:
            with open(path, "rb") as file:
                file.seek(start)
                data = file.read(size)
        except OSError as error:
            raise Broken(f"cannot read '{path}': {error.strerror}") from None
    if len(data) != size:
        raise Broken(f"'{path}' ends before byte {start + size:,}: it was written anew, or cut")
    return data


def whole(path: str, most: int) -> bytes:
    """A local file of at most so many bytes; Broken in one sentence where it is none."""
    try:
        if not os.path.isfile(path):  # nor a pipe, which would never end
            raise Broken(f"there is no file '{path}'")
        if os.path.getsize(path) > most:
            raise Broken(f"'{path}' has more than {most / 1e6:.0f} MB")
        return Path(path).read_bytes()
    except OSError as error:
        raise Broken(f"cannot read '{path}': {error.strerror}") from None


def _insist(ask: Callable[[], Result], address: str) -> Result:
    """The answer of a bucket, asked again where it fails or is silent; DataError after TRIES tries."""
    since, said = time.monotonic(), ""
    for number in range(TRIES):
        if number:
            time.sleep(PAUSE * 2 ** (number - 1))
        try:
            return _within(ask, DEADLINE)
        except (FileNotFoundError, PermissionError) as error:
            said = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
            if error.__cause__ is None:  # else a store calls every failure so
                raise DataError(f"cannot read '{address}': {said}") from error
        except DataError:
            raise
        except TimeoutError:
            said = f"no answer in {DEADLINE:.0f} s"
        except Exception as error:  # every store has errors of its own
            said = " ".join(str(error).split())[:200] or type(error).__name__
    seconds = time.monotonic() - since
    raise DataError(
        f"'{address}' could not be read in {TRIES} tries over {seconds:.0f} s: {said}; check the network and the "
        "credentials, and start the same command again: it goes on where it was"
    )


def _within(ask: Callable[[], Result], seconds: float) -> Result:
    """The result of a call; TimeoutError where it takes longer, and a thread that is left to itself."""
    done: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            done.append((True, ask()))
        except BaseException as error:
            done.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise TimeoutError
    good, result = done[0]
    if not good:
        raise result
    return result
