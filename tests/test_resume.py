import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.checkpoint import CheckpointError
from unclip_jax.checkpoint.store import Store
from unclip_jax.config import ClipConfig, DataConfig, OptimConfig, TrainConfig
from unclip_jax.optim import learning_rate, updates_done
from unclip_jax.preemption import Preempted, Preemption
from unclip_jax.sharding import make_mesh
from unclip_jax.train import fit
from unclip_jax.types import Batch, Stage

TIMED = ("images_per_second", "data_stall")  # metrics that no run repeats
BAD = 13  # a token that makes the loss blow up
CONFIG = TrainConfig(
    "toy",
    ClipConfig(),
    data=DataConfig(batch_size=4),
    optim=OptimConfig(learning_rate=1e-2, warmup=20, ema=0.9),
    steps=9,
    log_every=1,
    save_every=3,
    preview_every=100,
)


def init(key: Any) -> Any:
    return {"layer": {"kernel": jax.random.normal(key, (12, 1)), "bias": jnp.zeros(1)}}


def loss(params: Any, context: Any, batch: Batch, key: Any) -> Any:
    x = batch.image.astype(jnp.float32).reshape(len(batch.image), 12) / 255
    kept = jax.random.bernoulli(key, 0.9, x.shape)
    error = ((x * kept) @ params["layer"]["kernel"] + params["layer"]["bias"] - x[:, :1]) ** 2
    return jnp.where(jnp.any(batch.tokens == BAD), jnp.nan, error.mean()), {}


def preview(params: Any, context: Any, batch: Batch, keys: Any) -> Any:
    return batch.image


STAGE = Stage(init, loss)


def stream(start: int, bad: tuple[int, ...] = (), at: dict[int, Any] | None = None) -> Iterator[Batch]:
    """Batches; those of the steps in `bad` spoil the loss, and at the steps in `at` something happens."""
    for step in count(start):
        (at or {}).get(step, lambda: None)()
        image = np.random.default_rng([7, step]).integers(0, 256, (4, 2, 2, 3), np.uint8)
        token = BAD if step in bad else 1
        yield Batch(image, np.full((4, 2), token, np.int32), np.ones((4, 2), bool))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mesh):
    """A run of nine steps that nothing interrupted: its folder and its last state."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(CONFIG, STAGE, {}, stream, mesh, folder)


def same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def lines(folder: Path) -> list[dict[str, Any]]:
    def constant(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    found = [json.loads(line, parse_constant=constant) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in found]


def test_sigterm_saves_the_step_and_the_run_goes_on_bit_for_bit(tmp_path, mesh, whole):
    asked = {4: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="saved step 5: the same command") as stopped:
        fit(CONFIG, STAGE, {}, lambda start: stream(start, at=asked), mesh, tmp_path)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    with Store(tmp_path / "checkpoints") as store:
        assert store.latest() == 5
    # What a run that was killed wrote after its last save, a torn line too, is forgotten.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 99.0}) + "\n" + '{"step": 7, "lo')
    assert same(fit(CONFIG, STAGE, {}, stream, mesh, tmp_path), whole[1])
    assert lines(tmp_path) == lines(whole[0]) and [line["step"] for line in lines(tmp_path)] == list(range(1, 10))


def test_a_refused_resume_leaves_the_run_as_it_is(whole, mesh):
    folder, _ = whole
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="holds step 9: resume it or choose another folder"):
        fit(CONFIG, STAGE, {}, stream, mesh, folder, resume=False)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_skipped_steps_are_null_and_do_not_move_the_rate(tmp_path, mesh):
    state = fit(CONFIG, STAGE, {}, lambda start: stream(start, bad=(2, 3)), mesh, tmp_path)
    log = lines(tmp_path)
    assert [line["loss"] is None for line in log] == [step in (3, 4) for step in range(1, 10)]
    rates = [float(learning_rate(CONFIG.optim, done)) for done in (0, 1, 2, 2, 2, 3, 4, 5, 6)]
    np.testing.assert_allclose([line["learning_rate"] for line in log], rates, rtol=1e-6)
    assert int(state.step) == 9 and int(updates_done(state.opt_state)) == 7
    muon = replace(CONFIG, optim=replace(CONFIG.optim, kind="muon"))
    from unclip_jax.optim import optimizer

    assert int(updates_done(optimizer(muon.optim, init(jax.random.key(0))).init(init(jax.random.key(0))))) == 0


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path, mesh):
    from unclip_jax.train import init_state

    state = init_state(CONFIG, STAGE, mesh)
    losses = {1: 0.5, 2: 0.1, 3: 0.4, 4: None, 5: 0.3, 6: 0.2}
    for steps in ((1, 2, 3, 4), (5, 6)):  # two runs: the second has to know what the first one measured
        with Store(tmp_path, keep=2, best=1) as store:
            for step in steps:
                metrics = {} if losses[step] is None else {"loss": losses[step]}
                store.save(state._replace(step=jnp.int32(step)), CONFIG, {"step": step}, metrics)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]


def test_previews_show_the_same_pictures_after_a_resume(tmp_path, mesh):
    config, stage = replace(CONFIG, steps=6, preview_every=3), Stage(init, loss, preview)
    fit(replace(config, steps=3), stage, {}, stream, mesh, tmp_path)
    fit(config, stage, {}, stream, mesh, tmp_path)
    first, second = ((tmp_path / "samples" / f"{step:07d}.png").read_bytes() for step in (3, 6))
    assert first == second


def test_googles_notice_counts_as_sigterm():
    answers = iter([b"FALSE", b"TRUE"])

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/preempted" and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(next(answers))

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Preemption(f"http://127.0.0.1:{server.server_port}/preempted", poll=0.1) as preemption:
            assert not preemption.reached(1)
            deadline = time.monotonic() + 10
            while not preemption.reached(2) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert preemption.reached(3) and next(answers, None) is None
        server.shutdown()


def test_buckets_have_to_be_mounted(capsys: pytest.CaptureFixture[str]):
    from unclip_jax.cli import main

    assert main(["train", "--config", "emoji_clip", "--out", "gs://bucket/run"]) == 1
    assert "mount the bucket" in capsys.readouterr().err


def test_two_processes_killed_three_times_end_as_if_nothing_had_happened(tmp_path):
    """tests/kill_matrix.py: SIGTERM, then killed in a step, in a save, at the start; read again by one device."""
    script, out = Path(__file__).parent / "kill_matrix.py", tmp_path / "kills.json"
    moments = ["step", "save", "start"]
    command = [sys.executable, str(script), "--kills", "3", "--moments", *moments, "--terminate", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    results = json.loads(out.read_text())
    assert results["same_metrics"] and results["same_state"] and results["same_samples"]
    assert results["restored"] == {"1": True}
    assert results["survivors_ended_by_themselves"] and results["longest_end"] < 30
    assert results["terminated"] == [143, 143] and results["terminated_saved"]
