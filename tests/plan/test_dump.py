"""The compiler's text, read: an excerpt with what libtpu writes, and a real compilation where it is installed."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from unclip_jax.config import ClipConfig, DataConfig, DiffusionConfig, PriorConfig, TrainConfig, TransformerConfig
from unclip_jax.plan.compiler import Compiled, _complete, _refusal, compile_request
from unclip_jax.plan.dump import read_memory, read_program
from unclip_jax.plan.report import Plan, row, text
from unclip_jax.plan.request import Request
from unclip_jax.plan.slices import parse_slice

PROGRAM = Path(__file__).with_name("program.txt")
TRIPS = 5


@pytest.fixture(scope="module")
def program():
    with PROGRAM.open() as lines:
        return read_program(lines)


def test_flops_count_taps_that_meet_a_pixel_times_the_loop(program):
    taps = (3 * 64 - 2) ** 2
    convolution = 2 * 16 * 128 * 256 * taps
    products = 2 * 8 * 64 * 32 * 16  # a product per place of the first axis, which libtpu writes as a window
    assert program.flops == TRIPS * convolution + products


def test_collectives_by_kind_group_and_loop(program):
    found = {one.kind: one for one in program.collectives}
    assert set(found) == {"all-gather", "reduce-scatter", "collective-permute"}
    gathered, scattered = found["all-gather"], found["reduce-scatter"]
    assert (gathered.count, gathered.bytes, gathered.first) == (TRIPS, TRIPS * 2 * 9 * 128 * 256, (0, 1, 2, 3))
    assert (scattered.count, scattered.bytes, scattered.first) == (1, 2 * 64 * 512, (0, 2, 4, 6))
    assert gathered.wire == 0.75 * gathered.bytes
    assert found["collective-permute"].wire == 2 * 64 * 512


def test_combined_collectives_count_whole_and_steps_of_one_chain_once(program):
    groups = "channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}"
    chain = f'all-gather(%param.3), {groups}, dimensions={{0}}, frontend_attributes={{chain_id="4"}}'
    more = [
        f"  %both.1 = (bf16[64,512], bf16[8,64,32]) all-reduce(%param.1, %param.2), {groups}, to_apply=%add\n",
        f"  %begun = (bf16[8,32,16], bf16[16,32,16]) all-gather-start(%param.3), {groups}, dimensions={{0}}\n",
        *(f"  %step.{n} = bf16[16,32,16] {chain}\n" for n in range(3)),
    ]
    text = PROGRAM.read_text().replace("  %start = ", "".join(more) + "  %start = ")
    found = {(one.kind, one.group): one for one in read_program(text.splitlines(keepends=True)).collectives}
    assert len(found) == len(program.collectives) + 2
    assert found["all-reduce", 2][2:4] == (1, 2 * (64 * 512 + 8 * 64 * 32))
    assert found["all-gather", 2][2:4] == (2, 2 * 2 * 16 * 32 * 16)
    assert found["all-gather", 2].asynchronous and not found["all-reduce", 2].asynchronous


def test_what_stays_on_the_chip_is_no_traffic_of_its_memory(program):
    kernel, picture = 2 * 9 * 128 * 256, 2 * 16 * 64 * 64 * 128
    body = 4 + kernel + (picture + kernel + 2 * picture)  # a copy reads its count; the gather writes; the fusion both
    rest = 2 * 8 * (64 * 32 + 32 * 16 + 64 * 16) + 2 * 2 * 64 * 512 + 2 * (64 + 16) * 512
    assert program.traffic == TRIPS * body + rest


def test_a_loop_that_does_not_say_how_long_takes_the_given_number(program):
    endless = PROGRAM.read_text().replace("condition=%condition", "condition=%endless").splitlines(keepends=True)
    assert read_program(endless, TRIPS) == program


def test_memory_by_argument_and_peak(tmp_path):
    (tmp_path / "m.after_optimizations-memory-usage-report.txt").write_text(
        "Memory Space: default (color=0)\nTotal bytes: 4000000 (3.8MiB)\n"
        "Memory Space: vmem (color=1)\nTotal bytes: 7 (7B)\n"
    )
    (tmp_path / "m.after_optimizations-buffer-assignment.txt").write_text(
        "BufferAssignment:\nallocation 0: size 65536, parameter 0, shape |bf16[64,512]| at ShapeIndex {}:\n"
        " value: <1 param.1 @0> (size=65536,offset=0): bf16[64,512]{1,0}\n"
        "allocation 1: size 32768, parameter 1, shape |bf16[8,64,32]| at ShapeIndex {}, maybe-live-out:\n"
        "allocation 2: size 8192, parameter 2, shape |bf16[8,32,16]| at ShapeIndex {}:\n"
    )
    (tmp_path / "m.after_optimizations-live-range.txt").write_text(
        "  Live ranges at 7 (peak):\n    fusion.2{}: 100 bytes (cumulative: 100 bytes)\n"
        "    convolution.1{}: 300 bytes (cumulative: 400 bytes)\n"
        "    param.1{}: 65536 bytes (cumulative: 65936 bytes)\n  End\n"
    )
    (tmp_path / "m.after_optimizations.txt").write_text(PROGRAM.read_text())
    memory = read_memory(tmp_path, ["params", "opt_state", "batch"])
    assert memory.total == 4000000
    assert memory.arguments == {"params": 65536, "opt_state": 32768, "batch": 8192}
    assert read_memory(tmp_path, ["params", "batch"]).arguments == {"other": 65536, "params": 32768, "batch": 8192}
    assert memory.saved == 0.75  # of what is no argument, the forward pass made 300 of 400 bytes
    assert "conv_general_dilated" in memory.largest[1]


def test_the_compilers_refusal_is_its_own_words_and_numbers():
    said = (
        "XlaRuntimeError\nRESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (23.92G) exceeds available HBM (15.75G). Reduce it."
    )
    sentence, needs = _refusal(said)
    assert sentence.startswith("Ran out of memory on HBM") and "(15.75G)" in sentence
    assert needs == 23.92 * 2**30
    with pytest.raises(RuntimeError, match="UNIMPLEMENTED"):
        _refusal("XlaRuntimeError\nUNIMPLEMENTED: something")


def test_near_the_limit_the_compiler_has_the_last_word(tmp_path):
    def say(total):
        (tmp_path / "m.after_optimizations-memory-usage-report.txt").write_text(f"(color=0)\nTotal bytes: {total}\n")
        return _complete(tmp_path, usable=1000.0)

    assert _complete(tmp_path, 1000.0) == 0
    assert say(900) > 0 and say(1100) > 0
    assert say(990) == 0 and say(1010) == 0
    (tmp_path / "m.after_optimizations_after_buffer_assignment.txt").write_text("program")
    assert say(990) == len("program")


TOWER = TransformerConfig(128, 1, 2, causal=True, dtype="bfloat16")
CLIP = ClipConfig(64, 32, 16, TOWER, TOWER, vocab_size=256, context_length=12)
TINY = TrainConfig(
    "tiny",
    PriorConfig(64, 128, 12, TransformerConfig(256, 1, 4, causal=True, dtype="bfloat16")),
    DiffusionConfig(prediction="x0", clip=None),
    data=DataConfig(context_length=12),
    steps=1000,
)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    if find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed")
    cache = tmp_path_factory.mktemp("plans")
    request = Request(TINY, CLIP, "train", parse_slice("v5p-8"), "fsdp", 64)
    return request, cache, compile_request(request, cache)


def test_a_tiny_training_step_compiles_for_a_slice_that_is_not_here(planned):
    request, _, compiled = planned
    facts, memory, program = compiled.facts, compiled.memory, compiled.program
    assert facts["chips"] == 4 and facts["mesh"]["fsdp"] == 4
    # Parameters, average and both moments lie on four chips; what is small is on each.
    assert memory.arguments["params"] == pytest.approx(memory.arguments["ema"], rel=0.01)
    assert memory.arguments["opt_state"] == pytest.approx(2 * memory.arguments["params"], rel=0.05)
    assert 4 * facts["parameters"] / 4 < memory.arguments["params"] < 1.6 * 4 * facts["parameters"] / 4
    assert sum(memory.arguments.values()) < memory.total < 2**30
    assert 4 * program.flops == pytest.approx(sum(facts["model"].values()), rel=0.1)
    assert {one.kind for one in program.collectives} & {"all-gather", "reduce-scatter"}
    gathered = [one for one in program.collectives if one.kind == "all-gather"]
    assert sum(one.bytes for one in gathered if one.asynchronous) > 0.9 * sum(one.bytes for one in gathered)


def test_a_plan_is_computed_once_and_says_what_it_needs(planned, monkeypatch):
    request, cache, compiled = planned
    monkeypatch.setattr("unclip_jax.plan.compiler._run", lambda *_: pytest.fail("compiled again"))
    again = compile_request(request, cache)
    assert again == Compiled.from_json(again.to_json()) and again.memory == compiled.memory
    assert request.digest() != request._replace(batch=128).digest()
    assert Request.from_json(request.to_json()) == request
    plan = Plan(request, again, None)
    said = text(plan)
    assert "fits" in said and "all-gather" in said and "optimal_seconds" not in said
    assert row(plan)["hbm_gib"] == pytest.approx(compiled.memory.total / 2**30, rel=1e-4)


def test_names_and_logging_do_not_make_another_plan(planned):
    request, _, _ = planned
    assert request._replace(config=replace(TINY, name="other", log_every=3)).digest() == request.digest()


def test_a_plan_for_the_devices_that_are_here_says_what_it_cannot_know(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # of the child
    request = Request(TINY, CLIP, "sample", None, "dp", 0)
    compiled = compile_request(request, tmp_path)
    facts, memory = compiled.facts, compiled.memory
    assert memory is not None and facts["images"] == facts["chips"]  # one picture for each of them
    assert memory.arguments["params"] == pytest.approx(2 * facts["parameters"], rel=0.01)  # bf16, whole on each
    assert sum(memory.arguments.values()) <= memory.total
    plan = Plan(request, compiled, None)
    assert plan.fits is None and "neither speed nor memory of 'cpu' is known" in text(plan)
