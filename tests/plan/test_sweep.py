"""Sweeps rank what the compiler said of each candidate, and ask it about none that arithmetic refuses."""

import argparse
import json

import jax
import jax.numpy as jnp
import pytest

from unclip_jax.config import DataConfig, TrainConfig, UNetConfig, UpsamplerConfig
from unclip_jax.plan import kept, sweep
from unclip_jax.plan.compiler import Compiled
from unclip_jax.plan.dump import Memory, Program
from unclip_jax.plan.report import Plan, _roofline, row
from unclip_jax.plan.slices import GIB, parse_slice

CONFIG = TrainConfig(
    "u",
    UpsamplerConfig(UNetConfig(in_channels=6, channels=128, multipliers=(1,), depth=1)),
    data=DataConfig(size=64, batch_size=64),
    steps=1000,
)
OPTIONS = argparse.Namespace(
    what="train", batch=None, clip=None, depth="memory", cache=None, strategy=None, remat=None, out=None
)
PATHS = {"Upsampler/unet/down_0_0/conv_0": 1e15}


def pretend(request, *_):
    """More memory without recomputation than v5e has, and a third more work with it."""
    again = {path: flops / 3 for path, flops in PATHS.items()} if request.config.remat == "block" else {}
    chips = request.slice.chips
    facts = {
        "chips": chips, "kind": "TPU", "mesh": {"data": chips}, "images": request.batch, "trips": 1, "parameters": 1000,
        "model": PATHS, "again": again, "state_bytes": 1e6, "places": [[0, 0]] * chips, "slices": [0] * chips,
    }  # fmt: skip
    needed = (30 if request.config.remat == "none" else 10) * GIB
    memory = Memory(needed, {"params": 1e6}, 0.5, ())
    compiled = Compiled(facts, memory, Program(1e15 / chips, 1e9, ()), None, None, 60.0, 2 * GIB)
    return Plan(request, compiled, _roofline(request, compiled))


@pytest.fixture(scope="module")
def plans():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "make_plan", pretend)
        return sweep.sweep(CONFIG, [parse_slice("v5e-8"), parse_slice("v5p-16")], OPTIONS)


def test_what_fits_comes_first_and_the_cheapest_of_each_generation_is_named(plans):
    fits = [plan.fits for plan in plans]
    assert fits == sorted(fits, reverse=True) and not all(fits)
    assert all(plan.request.slice.generation.name == "v5e" for plan in plans if not plan.fits)
    hours = [plan.chip_hours for plan in plans if plan.fits]
    assert hours == sorted(hours)
    named = [line for line in sweep.table(plans).splitlines() if line.startswith("cheapest")]
    assert len(named) == 2
    # A v5p holds all activations; a v5e has to recompute, but not as much as everything.
    assert "none" in next(line for line in named if "v5p" in line)
    assert "products" in next(line for line in named if "v5e" in line)


def test_rows_are_kept_as_json_lines(plans, tmp_path):
    sweep.save(plans, tmp_path / "sweep.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert lines == [row(plan) for plan in plans]
    assert kept.markdown(lines).count("| u |") == len(plans)


def test_a_state_that_no_chip_holds_is_refused_by_arithmetic():
    params = {"kernel": jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)}  # 4.3G parameters, 69 GB of state
    assert sweep.too_large(params, parse_slice("v5e-8"), "dp")
    assert not sweep.too_large(params, parse_slice("v5e-8"), "fsdp")


def test_the_kept_plans_cover_every_network_generation_and_slice():
    found = list(kept.cases())
    assert len(found) == len(set(found)) > 85
    decoders = {case.slice for case in found if case.config == "dalle2_decoder" and case.what == "train"}
    assert {"v5p-16", "v5p-512", "v4-16", "v5e-8", "v5e-256", "v6e-32"} <= decoders


def test_counting_anew_changes_what_follows_from_flops_and_nothing_else(monkeypatch):
    case = next(case for case in kept.cases() if case.config == "dalle2_up256" and case.what == "train")
    plan = pretend(kept._request(case))
    values = {**row(plan), "asked_remat": case.remat}
    facts = {**plan.compiled.facts, "state_bytes": 0.0}  # on one slice; how much a chip has elsewhere, rows tell
    monkeypatch.setattr(kept, "count_request", lambda _: facts)
    assert list(kept.recount([values])) == [values]
    monkeypatch.setattr(kept, "count_request", lambda _: facts | {"model": {path: 2e15 for path in PATHS}})
    (anew,) = kept.recount([values])
    assert anew["model_flops"] == 2 * values["model_flops"] and anew["step"] > 1.9 * values["step"]
    assert {key for key in values if anew[key] != values[key]} <= set(kept.COUNTED)


def test_the_kept_tables_are_of_the_kept_rows_and_both_counts_of_flops_agree():
    rows = kept.rows()
    assert kept.PLANS.with_suffix(".md").read_text(encoding="utf-8").endswith(kept.markdown(rows) + "\n")
    for values in rows:
        if "compiled_flops" in values:
            counted = values["model_flops"] + values["recomputed_flops"]
            assert values["compiled_flops"] == pytest.approx(counted, rel=0.1), values["config"]
