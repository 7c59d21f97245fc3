"""`unclip bench sharding`: rows are complete, add up, are measured once, and say why there is nothing to measure."""

import re
from types import SimpleNamespace

import pytest

from unclip_jax.bench import predicted, runner
from unclip_jax.bench.cases import Case, Here, all_cases
from unclip_jax.bench.report import efficiency, line, plot, table
from unclip_jax.checkpoint.schema import to_json
from unclip_jax.cli import main
from unclip_jax.config import TrainConfig, UNetConfig, UpsamplerConfig
from unclip_jax.plan.slices import parse_slice

CONFIG = TrainConfig("u", UpsamplerConfig(UNetConfig(in_channels=6, channels=8, multipliers=(1,), depth=1, groups=4)))
SMALL = """
from unclip_jax.config import ClipConfig, DataConfig, TrainConfig, TransformerConfig

def get_config():
    vision, text = TransformerConfig(8, 1, 1), TransformerConfig(8, 1, 1, causal=True)
    return TrainConfig("small", ClipConfig(8, 8, 8, vision, text, vocab_size=16, context_length=4), data=DataConfig())
"""


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """A real bench, run once: two devices that share the rows, and sizes that do not fit."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "small.py").write_text(SMALL)
    words = f"bench sharding --config {folder / 'small.py'} --cpu-devices 2 --devices 2 --strategy dp fsdp=3"
    command = [*words.split(), "--batch", "8", "--steps", "4", "--warmup", "1", "--out", str(folder / "rows.jsonl")]
    assert main(command) == 0
    return folder, command


def test_rows_are_complete_and_add_up(benched):
    folder, _ = benched
    row, _ = runner.read(folder / "rows.jsonl")
    assert (row["devices"], row["strategy"], row["mesh"]["data"], row["batch"], row["remat"]) == (2, "dp", 2, 8, "none")
    assert row["step_p10"] <= row["step_median"] <= row["step_p90"] and row["compile_seconds"] > 0
    assert row["images_per_second"] == row["batch"] / row["step_median"]
    assert row["memory_bytes"] >= row["state_bytes"] >= 16 * row["parameters"] and row["memory_from"] == "compiler"
    assert (row["efficiency"], row["against"]) == (1, 2)
    assert (folder / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_refused_says_why(benched):
    folder, _ = benched
    rows = runner.read(folder / "rows.jsonl")
    assert "the mesh fsdp=3 takes 3 devices and there are 2: use" in rows[1]["refused"]
    text = table(rows, "cpu")
    assert text.count("refused: 2 x fsdp=3") == 1 and "these 2 devices share one processor" in text


def test_what_a_file_holds_is_not_run_again(benched, monkeypatch):
    folder, command = benched
    path, asked = folder / "rows.jsonl", []
    monkeypatch.setattr(runner, "ask", lambda request, _: asked.append(request["case"]["devices"]) or {"refused": "so"})
    assert main(command) == 0 and not asked
    measured, refused = path.read_text().splitlines()
    path.write_text(f"{measured[:-9]}\n{refused}\n{refused[:40]}")  # as a bench leaves it that was stopped
    assert main(command) == 0 and asked == [2]
    assert main([*command, "--devices", "1", "2"]) == 0 and asked == [2, 1]
    assert [row["devices"] for row in runner.read(path)] == [2, 2, 1]
    assert main([*command, "--optim.kind", "muon"]) == 0 and asked == [2, 1, 2]  # another config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config quick_decodr", "did you mean quick_decoder"),
        ("--config quick_prior --strategy fdsp", "unknown strategy 'fdsp': did you mean fsdp"),
        (
            "--config quick_prior --devices 8 --batch 12 --strategy dp fsdp",
            "a batch of 12 does not divide .* use 8 or 16",
        ),
        ("--config quick_prior --devices 16", "there are 8 devices here, not 16"),
        ("--config quick_prior --steps 0", "--steps must be positive"),
        ("--config quick_prior --optim.lerning-rate 1", "did you mean --optim.learning-rate"),
    ],
)
def test_bad_input_is_one_sentence(words, message, capsys):
    assert main(["bench", "sharding", "--cpu-devices", "8", *words.split()]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)


def test_every_mesh_is_measured_once_and_one_device_has_no_strategy():
    cases = all_cases(CONFIG, Here(8, "cpu", "cpu"), (8, 1), ("dp", "data=8", "hsdp"), (8, 16), ("none", "block"))
    assert [case.devices for case in cases] == [1] * 4 + [8] * 8
    assert {case.strategy for case in cases[:4]} == {"dp"} and {case.strategy for case in cases[4:]} == {"dp", "hsdp"}


def row_of(devices, strategy, rate, batch=8, remat="none", **more):
    return dict(
        config="u", kind="TPU v5 lite", devices=devices, strategy=strategy, batch=batch, remat=remat, state_bytes=2**28,
        step_median=batch / rate, step_p10=0.9 * batch / rate, step_p90=1.2 * batch / rate, images_per_second=rate,
        compile_seconds=2.0, memory_bytes=2**30, memory_from="device", **more,
    )  # fmt: skip


def test_efficiency_is_to_the_fewest_devices_of_the_same_batch_and_remat(tmp_path):
    rows = [row_of(1, "dp", 10), row_of(1, "dp", 4, remat="block"), row_of(2, "dp", 12, 16), row_of(2, "tp", 15, 16)]
    assert efficiency(row_of(8, "fsdp", 60), rows) == (pytest.approx(0.75), 1)
    assert efficiency(row_of(8, "fsdp", 30, 16), rows) == (pytest.approx(0.5), 2)
    full = Case(8, "dp", 8, "none")._asdict() | {"config": "u", "kind": "TPU v5 lite", "refused": "out of memory: more"}
    rows = [row_of(8, "fsdp", 60, plan_step=0.1, plan_memory_bytes=2**30), *rows, full]
    text = table(rows, "tpu")
    assert "75%" in text and re.search(r"256.0 MiB +100 +1.00 GiB\n", text) and "processor" not in text
    assert "fastest: 8 x fsdp" in text and line(full).endswith("remat none: out of memory: more")
    assert plot(rows, tmp_path / "plot.png") and (tmp_path / "plot.png").stat().st_size > 10_000


def test_plan_is_asked_for_chips_that_it_knows(monkeypatch):
    asked, pod = [], Here(8, "TPU v5 lite", "tpu")
    plan = SimpleNamespace(compiled=SimpleNamespace(memory=None, needs=5.0), roofline=None, fits=False)
    monkeypatch.setattr(predicted, "make_plan", lambda request, cache: asked.append(request) or plan)
    found = predicted.predictor(CONFIG, None, pod)(Case(8, "fsdp", 64, "block"))
    assert found == {"plan_step": None, "plan_memory_bytes": 5.0, "plan_fits": False}
    (request,) = asked
    assert request.slice.name == "v5e-8" and request.config.network.unet.remat == "block" and request.batch == 64
    assert predicted.slice_of(pod, 3) is None
    assert predicted.slice_of(Here(16, "TPU v4", "tpu", 2), 16) == parse_slice("2xv4-16")
    assert predicted.predictor(CONFIG, None, Here(8, "cpu", "cpu"))(Case(8, "dp", 64, "none")) == {}


def test_errors_death_and_delay_of_a_process_are_reasons():
    case = Case(2, "fsdp=2,tensor=2", 8, "none")  # of two devices
    request = {"case": case._asdict(), "config": to_json(CONFIG), "clip": None, "steps": 1, "warmup": 1}
    refused = runner.ask(request | {"cpu_devices": 2}, 100.0)["refused"]
    assert refused.startswith("the mesh fsdp=2,tensor=2 takes 4 devices and there are 2: use")
    assert "took longer than 0 s" in runner.ask({}, 0.0)["refused"]
    assert runner._death(-9, []).startswith("out of memory: the system ended")
    assert "(signal 11): bad" in runner._death(-11, ["bad"])
    assert runner._sentence("XlaRuntimeError", "RESOURCE_EXHAUSTED: Out of\nmemory").startswith("out of memory: RES")
