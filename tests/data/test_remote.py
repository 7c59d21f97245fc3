"""Tars in a bucket: read by ranges, and a server that refuses, fails or says nothing is asked again, then named."""

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pytest

from unclip_jax.data import remote
from unclip_jax.data.records import DataError, open_source

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # it would ask by gRPC what kind of bucket this is
pytest.importorskip("gcsfs")


class Bucket(ThreadingHTTPServer):
    """The few calls of Google's storage that reading takes, on this machine, over the files of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.mood, self.failures, self.ranges = "well", 0, []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Bucket

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        if self.server.mood == "silent":
            time.sleep(3)
            return
        if self.server.failures:
            self.server.failures -= 1
            self.answer(500, b"not now")
            return
        url = urlparse(self.path)
        folder, options = self.server.folder, parse_qs(url.query)
        if url.path.rstrip("/").endswith("/o"):
            prefix = options.get("prefix", [""])[0]
            items = [self.told(path) for path in sorted(folder.iterdir()) if path.name.startswith(prefix)]
            self.answer(200, json.dumps({"items": items}).encode())
            return
        path = folder / unquote(url.path).rpartition("/")[2]
        if not path.is_file():
            self.answer(404, b'{"error": {"message": "no such object"}}')
        elif "alt" in options:
            data, asked = path.read_bytes(), self.headers.get("Range")
            first, last = (int(end) for end in asked.removeprefix("bytes=").split("-"))
            self.server.ranges.append(last + 1 - first)
            self.answer(206, data[first : last + 1])
        else:
            self.answer(200, json.dumps(self.told(path)).encode())

    def told(self, path: Path) -> dict[str, str]:
        size = str(path.stat().st_size)
        return {"kind": "storage#object", "name": path.name, "bucket": "pics", "size": size, "generation": "1"}

    def answer(self, code: int, data: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def bucket(tars, monkeypatch) -> Iterator[Bucket]:
    import fsspec
    import gcsfs

    server = Bucket(tars)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    options = {"token": "anon", "endpoint_url": server.address, "skip_instance_cache": True}
    monkeypatch.setitem(fsspec.config.conf, "gs", options)
    monkeypatch.setitem(fsspec.config.conf, "gcs", options)
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    remote._filesystem.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield server
    server.shutdown()
    server.server_close()
    remote._filesystem.cache_clear()


def test_tars_in_a_bucket_are_read_by_ranges(bucket, tars, pictures):
    source, local = open_source("tar:gs://pics/*.tar"), open_source(f"tar:{tars}/*.tar")
    assert len(source) == len(local) == 12
    bucket.ranges.clear()
    for index in (0, 7, 11):
        assert source[index] == local[index] and source[index].image == pictures[index][0]
    assert len(bucket.ranges) == 6 and max(bucket.ranges) < 8192  # one request a record, for its bytes alone


def test_failures_are_tried_again(bucket, pictures):
    source = open_source("tar:gs://pics/00000.tar")
    bucket.failures = 2
    assert source[1].image == pictures[1][0]


def test_a_silent_bucket_is_said(bucket, monkeypatch):
    source = open_source("tar:gs://pics/00000.tar")
    monkeypatch.setattr(remote, "DEADLINE", 0.2)
    monkeypatch.setattr(remote, "TRIES", 2)
    bucket.mood = "silent"
    since = time.monotonic()
    with pytest.raises(DataError, match=r"'gs://pics/00000.tar' could not be read in 2 tries .*: no answer in 0 s"):
        source[0]
    assert time.monotonic() - since < 3
    with pytest.raises(DataError, match="2 tries"):
        open_source("tar:gs://pics/0*.tar")


def test_a_server_that_refuses_is_said(bucket, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 2)
    with pytest.raises(DataError, match=r"'http://127.0.0.1:9/a.tar' could not be read in 2 tries .*Cannot connect"):
        open_source("tar:http://127.0.0.1:9/a.tar")


def test_what_is_not_there_is_said_at_once(bucket):
    with pytest.raises(DataError, match="there is no file 'gs://pics/none"):
        open_source("tar:gs://pics/none*.tar")
    with pytest.raises(DataError, match="cannot read 'gs://pics/none.tar'"):
        open_source("tar:gs://pics/none.tar")
