import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

# Nothing of the package is imported up here: pytest loads this file before jaxtyping's import hook is in place.

DOWN = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
REPOSITORY = "owner/karlo"
UP = ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")


class Oracle:
    """Tiny models of diffusers with the settings of Karlo's, on the CPU, every tensor away from zero and one."""

    def __init__(self) -> None:
        import diffusers
        import torch
        from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

        torch.set_num_threads(2)
        self.torch, self.diffusers, self.projections_class = torch, diffusers, UnCLIPTextProjModel

    def prior(self, **changes: Any) -> Any:
        settings = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 24}
        return self._perturbed(self.diffusers.PriorTransformer, settings | {"num_embeddings": 11} | changes)

    def decoder(self, widths: tuple[int, ...] = (32, 64), attends: tuple[bool, ...] = (False, True), **changes: Any):
        settings = self._unet(widths, attends) | {
            "in_channels": 3,
            "out_channels": 6,
            "attention_head_dim": 16,
            "class_embed_type": "identity",
            "cross_attention_dim": 32,
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "resnet_time_scale_shift": "scale_shift",
            "sample_size": 16,
        }
        return self._perturbed(self.diffusers.UNet2DConditionModel, settings | changes)

    def projections(self, **changes: Any) -> Any:
        settings = {"clip_embeddings_dim": 24, "time_embed_dim": 128, "cross_attention_dim": 32}
        return self._perturbed(self.projections_class, settings | changes)

    def upsampler(self, widths: tuple[int, ...] = (32, 64), **changes: Any) -> Any:
        settings = self._unet(widths, (False,) * len(widths)) | {"in_channels": 6, "add_attention": False}
        return self._perturbed(self.diffusers.UNet2DModel, settings | {"sample_size": 64} | changes)

    def scheduler(self, **settings: Any) -> Any:
        return self.diffusers.UnCLIPScheduler(**settings)

    def tensors(self, model: Any) -> dict[str, np.ndarray]:
        return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    def call(self, function: Callable[..., Any], **given: Any) -> Any:
        """A model's answer to arrays, as numpy; pictures stay as torch has them."""
        for name, value in given.items():
            if hasattr(value, "__array__") and not isinstance(value, self.torch.Tensor):
                given[name] = self.torch.from_numpy(np.array(value))
        with self.torch.no_grad():
            answer = function(**given)
        return [item.numpy() for item in answer] if isinstance(answer, tuple) else answer[0].numpy()

    def _unet(self, widths: tuple[int, ...], attends: tuple[bool, ...]) -> dict[str, Any]:
        return {
            "block_out_channels": widths,
            "down_block_types": tuple(DOWN[a] for a in attends),
            "up_block_types": tuple(UP[a] for a in reversed(attends)),
            "layers_per_block": 1,
            "norm_num_groups": 8,
        }

    def _perturbed(self, kind: Any, settings: dict[str, Any]) -> Any:
        self.torch.manual_seed(0)
        model = kind(**settings).eval()
        for tensor in model.parameters():
            if float(tensor.detach().std()) == 0 or tensor.ndim == 1:
                tensor.data += 0.3 * self.torch.randn_like(tensor)
        return model


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="session")
def fill() -> Callable[..., dict[str, Any]]:
    """The tree of a shape tree, filled from tensors by a table."""

    def filled(entries: list, tensors: Mapping[str, np.ndarray], shapes: Any) -> dict[str, Any]:
        from pathlib import Path

        from unclip_jax.checkpoint.sources import TensorSource
        from unclip_jax.interop.loading import load_params

        return load_params(entries, TensorSource(Path("oracle"), tensors), shapes)

    return filled


class TinyKarlo(NamedTuple):
    """A tiny Karlo in the published layout: both repositories' folders, and both pipelines as diffusers loads them."""

    text: Path
    picture: Path
    text_pipeline: Any
    picture_pipeline: Any


@pytest.fixture(scope="session")
def tiny_karlo(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> TinyKarlo:
    """Contexts of 11 tokens, pictures of 16 and 32 px, embeddings of 24."""
    import diffusers.pipelines
    import transformers
    from diffusers.pipelines.deprecated import unclip

    from unclip_jax.data.tokenizer import ClipTokenizer
    from unclip_jax.interop.clip_tokenizer import save_tokenizer

    root = tmp_path_factory.mktemp("karlo")
    size = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 24}
    text = transformers.CLIPTextConfig(
        **size, hidden_size=24, vocab_size=49408, max_position_embeddings=11, eos_token_id=2
    )
    vision = transformers.CLIPVisionConfig(**size, hidden_size=32, image_size=32, patch_size=8)
    towers = {
        "text_encoder": transformers.CLIPTextModelWithProjection(text),
        "image_encoder": transformers.CLIPVisionModelWithProjection(vision),
    }
    for tower in towers.values():
        for tensor in tower.eval().parameters():
            tensor.data += (0.2 if tensor.ndim == 1 else 0.05) * oracle.torch.randn_like(tensor)
    last = oracle.upsampler((32,), sample_size=32)
    for tensor in last.parameters():
        tensor.data += 0.05 * oracle.torch.randn_like(tensor)
    last.register_to_config(sample_size=None)  # as published

    save_tokenizer(ClipTokenizer(11), root / "tokenizer")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = root / "tokenizer" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "!"}))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(root / "tokenizer")
    prior_scheduler = oracle.scheduler(prediction_type="sample", clip_sample_range=5.0)
    shared = towers | {
        "tokenizer": tokenizer,
        "prior": oracle.prior(),
        "text_proj": oracle.projections(),
        "decoder": oracle.decoder((32,), (True,)),
        "super_res_first": oracle.upsampler((32,), sample_size=32),
        "super_res_last": last,
        "prior_scheduler": prior_scheduler,
        "decoder_scheduler": oracle.scheduler(variance_type="learned_range"),
        "super_res_scheduler": oracle.scheduler(),
        "feature_extractor": transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
    }
    only_text, only_picture = ("prior", "prior_scheduler"), ("image_encoder", "feature_extractor")
    diffusers.pipelines.unclip = unclip  # without which no published folder loads (diffusers 0.42)
    loaded = []
    for name, kind, absent in (
        ("text", unclip.UnCLIPPipeline, only_picture),
        ("picture", unclip.UnCLIPImageVariationPipeline, only_text),
    ):
        kind(**{key: part for key, part in shared.items() if key not in absent}).save_pretrained(root / name)
        index = json.loads((root / name / "model_index.json").read_text())
        index["text_proj"] = ["unclip", "UnCLIPTextProjModel"]
        (root / name / "model_index.json").write_text(json.dumps(index))
        for file in (root / name / "tokenizer").iterdir():
            file.unlink()
        for file in (root / "tokenizer").iterdir():
            (root / name / "tokenizer" / file.name).write_bytes(file.read_bytes())
        loaded.append(kind.from_pretrained(root / name))
        loaded[-1].set_progress_bar_config(disable=True)
    return TinyKarlo(root / "text", root / "picture", *loaded)


class Server(ThreadingHTTPServer):
    """Repositories by commit, and what is to go wrong with them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.refusals: dict[str, tuple[int, str]] = {}  # part of a path -> status and the hub's code for it
        self.cuts: dict[str, int] = {}  # file -> how often it breaks off in its middle
        self.log: list[tuple[str, str, str]] = []  # method, path, range

    def push(self, files: dict[str, bytes], repository: str = REPOSITORY, branch: str = "main") -> str:
        contents = [(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items())]
        commit = hashlib.sha1(json.dumps([repository, contents]).encode()).hexdigest()
        self.commits[commit], self.branches[repository, branch] = files, commit
        return commit

    def fetched(self) -> list[str]:
        """The files of which bytes were sent, once per request."""
        return [path.split("/", 5)[5] for method, path, _ in self.log if method == "GET" and "/resolve/" in path]


def point(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Sends the client to a port of the loopback instead of the hub."""
    from huggingface_hub import constants

    hub = constants.ENDPOINT
    for name, value in vars(constants).copy().items():
        if isinstance(value, str) and value.startswith(hub):
            monkeypatch.setattr(constants, name, value.replace(hub, f"http://127.0.0.1:{port}", 1))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.log.append((self.command, path, self.headers.get("Range", "")))
        for part, (status, code) in self.server.refusals.items():
            if part in path:
                return self.answer(status, {"X-Error-Code": code}, b"{}")
        match [unquote(part) for part in path.split("/")[1:]]:
            case ["api", "models", owner, name, "revision" | "tree" as what, revision]:
                file = ""
            case [owner, name, "resolve" as what, revision, *parts]:
                file = "/".join(parts)
            case _:
                return self.answer(404, {}, b"{}")
        repository = f"{owner}/{name}"
        if (repository, "main") not in self.server.branches:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        commit = self.server.branches.get((repository, revision), revision)
        if commit not in self.server.commits:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        files = self.server.commits[commit]
        if what == "revision":
            listing = {"id": repository, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, {}, json.dumps(listing).encode())
        if what == "tree":
            tree = [{"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40} for file in files]
            return self.answer(200, {}, json.dumps(tree).encode())
        if file not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"")
        data = files[file]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        cut = self.command == "GET" and self.server.cuts.get(file, 0) > 0
        if cut:
            self.server.cuts[file] -= 1
        self.answer(206 if first else 200, headers, data[first:], cut)

    def answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) * 15 // 16] if cut else body)
        if cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An empty hub; the client sees no other machine, no other cache and no one's login."""
    from huggingface_hub import constants

    connect, elsewhere = socket.socket.connect, []

    def loopback(self: socket.socket, address: tuple) -> None:
        if address[0] != "127.0.0.1":
            elsewhere.append(address)
            raise ConnectionRefusedError(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", loopback)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with Server() as running:
        point(monkeypatch, running.server_port)
        settings = {
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_STORED_TOKENS_PATH": str(tmp_path / "tokens"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.shutdown()
    assert elsewhere == []


@pytest.fixture
def unplug(monkeypatch: pytest.MonkeyPatch):
    """Makes the network go away: nobody listens on the port of the endpoint."""

    def unplugged() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            point(monkeypatch, free.getsockname()[1])

    return unplugged
