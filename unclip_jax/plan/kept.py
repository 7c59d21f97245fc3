"""The plans that the repository keeps: the paper's networks and Karlo's, trained and sampled, on every generation.

`python -m unclip_jax.plan.kept` computes what plans.jsonl lacks, a line at a time: stop it and start it as you like.
`python -m unclip_jax.plan.kept --again --only v5p` computes lines anew, but for those in the cache of finished plans.
`python -m unclip_jax.plan.kept --recount` counts their FLOPs anew, by tracing alone, and what follows from them.
`python -m unclip_jax.plan.kept --markdown` prints the file as tables.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from unclip_jax.overrides import apply, load_config
from unclip_jax.plan.command import request_of
from unclip_jax.plan.compiler import Compiled, count_request
from unclip_jax.plan.report import Plan, estimate, make_plan, row
from unclip_jax.plan.request import Request
from unclip_jax.plan.slices import GENERATIONS, GIB, all_slices, parse_slice

PLANS = Path(__file__).with_name("plans.jsonl")
BFLOAT16 = "--network.unet.dtype", "bfloat16"
TRANSFORMER = "--network.transformer.dtype", "bfloat16"
# Karlo's configs compute in float32, as its files do; plans are for bf16.
NETWORKS: dict[str, tuple[str, ...]] = {
    "dalle2_clip": (),
    "dalle2_prior": (),
    "dalle2_ar_prior": (),
    "dalle2_decoder": (),
    "dalle2_up256": (),
    "dalle2_up1024": (),
    "karlo_prior": TRANSFORMER,
    "karlo_decoder": BFLOAT16,
    "karlo_up256": BFLOAT16,
}
BY_BLOCK = ("dalle2_clip", "dalle2_prior", "dalle2_ar_prior", "dalle2_decoder")  # what they recompute
CHIPS = 64  # of the slice that each network is trained on
SAMPLED = {"dalle2_decoder": 4, "dalle2_up1024": 1, "karlo_up256": 4, "dalle2_up256": 4}  # images at once, else 16

COUNTED = (
    "limit_gib", "model_flops", "recomputed_flops", "parts", "step", "at_peak", "images_per_second", "share_of_peak",
    "assumed", "days", "chip_hours",
)  # fmt: skip


class Case(NamedTuple):
    """One kept plan; remat None: the config's own."""

    config: str
    what: str
    slice: str
    strategy: str
    remat: str | None
    batch: int | None

    def matches(self, values: dict[str, Any]) -> bool:
        """Whether a row of the file is this plan's."""
        own = {"config": self.config, "what": self.what, "slice": self.slice, "strategy": self.strategy}
        return all(values[key] == value for key, value in own.items()) and values["asked_remat"] == self.remat


def cases() -> Iterator[Case]:
    """All of them, the small and the telling first."""
    for generation in GENERATIONS.values():
        slices = all_slices(generation)
        for config in NETWORKS:
            remat = "block" if config in BY_BLOCK else None
            place = next(one for one in slices if one.chips == CHIPS)
            yield Case(config, "train", place.name, "fsdp", remat, None)
            yield Case(config, "sample", slices[0].name, "dp", None, SAMPLED.get(config, 16))
        for place in slices:
            if 8 <= place.chips <= 256 and place.chips != CHIPS:
                yield Case("dalle2_decoder", "train", place.name, "fsdp", "block", None)
    # The decoder with norms and attention alone computed again, without recomputation, and whole on every chip.
    yield Case("dalle2_decoder", "train", "v4-128", "fsdp", "products", None)
    yield Case("dalle2_decoder", "train", "v6e-64", "fsdp", "products", None)
    yield Case("dalle2_decoder", "train", "v5p-128", "fsdp", "none", None)
    yield Case("dalle2_decoder", "train", "v5p-128", "fsdp", "products", None)
    yield Case("dalle2_decoder", "train", "v5e-256", "fsdp", "products", None)
    yield Case("dalle2_decoder", "train", "v5p-128", "dp", "block", None)


def rows() -> list[dict[str, Any]]:
    """What is kept."""
    return [json.loads(line) for line in PLANS.read_text(encoding="utf-8").splitlines()] if PLANS.exists() else []


def _request(case: Case) -> Request:
    options = argparse.Namespace(what=case.what, batch=case.batch, clip=None, depth="memory")
    config = apply(load_config(case.config), NETWORKS[case.config])
    return request_of(options, config, parse_slice(case.slice), case.strategy, case.remat)


def add(case: Case, cache: Path | None) -> dict[str, Any]:
    """Plans one case and puts it at the end of the file, in place of what was there."""
    request = _request(case)
    compiler = ", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu"))
    values = {**row(make_plan(request, cache)), "asked_remat": case.remat, "compiler": compiler}
    _keep([*(one for one in rows() if not case.matches(one)), values])
    return values


def _keep(kept: Iterable[dict[str, Any]]) -> None:
    part = PLANS.with_suffix(".part")
    part.write_text("".join(json.dumps(values) + "\n" for values in kept), encoding="utf-8")
    part.replace(PLANS)


def recount(kept: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows with the FLOPs that are counted now and what the roofline makes of them; the compiler's word stands.

    Each distinct step is traced once: its FLOPs are the same on every slice.
    """
    traced: dict[tuple[Any, ...], dict[str, Any]] = {}
    for values in kept:
        step = values["config"], values["what"], values["batch"], values["asked_remat"]
        request = _request(Case(*step[:2], values["slice"], values["strategy"], step[3], step[2]))
        if step not in traced:
            traced[step] = count_request(request)
        place = parse_slice(values["slice"])
        facts, bandwidth = {**traced[step], "chips": place.chips}, place.generation.bandwidth
        if values["what"] == "train":
            facts["state_bytes"] = values["state_gib"] * GIB
        line = estimate(
            request, place, facts, values["interconnect"], values["hidden"], values["hbm_traffic"] * bandwidth
        )
        found = row(Plan(request, Compiled(facts, None, None, None, None, 0.0, 0.0), line))
        yield {**values, **{key: found[key] for key in COUNTED}}


def markdown(kept: Sequence[dict[str, Any]]) -> str:
    """Tables of training and of sampling plans."""
    lines = []
    for what, unit in (("train", "days"), ("sample", "")):
        lines += [f"\n### {'Training' if what == 'train' else 'Sampling'}\n"]
        lines += [
            "| network | slice | mesh | batch | remat | HBM GiB | of | fits | FLOPs vs counted | images/s | of peak |"
        ]
        lines[-1] += f" {unit} |" if unit else ""
        lines += ["|---" * (12 if unit else 11) + "|"]
        for r in sorted(
            (r for r in kept if r["what"] == what), key=lambda r: (r["config"], r["slice"][:3], r["chips"])
        ):
            mesh = ",".join(f"{axis}={size}" for axis, size in r["mesh"].items() if size > 1) or "-"
            counted = r["model_flops"] + r["recomputed_flops"]
            off = f"{r['compiled_flops'] / counted - 1:+.1%}" if "compiled_flops" in r else "-"
            cells = [
                r["config"], r["slice"], mesh, r["batch"], r["remat"], f"{r['hbm_gib'] or 0:.2f}",
                f"{r['limit_gib']:.2f}", "yes" if r["fits"] else "no", off,
                f"{r['images_per_second']:,.4g}", f"{100 * r['share_of_peak']:.0f}%",
                *([f"{r['days']:,.1f}"] if unit else []),
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Completes or prints the file; see the module."""
    parser = argparse.ArgumentParser("python -m unclip_jax.plan.kept", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print the file as tables")
    parser.add_argument("--again", action="store_true", help="compute what is there anew")
    parser.add_argument("--recount", action="store_true", help="count FLOPs anew, compiling nothing")
    parser.add_argument("--only", default="", help="plans whose text contains this, such as v5p or karlo_up256")
    parser.add_argument("--cache", type=Path, help="folder of finished plans")
    options = parser.parse_args(arguments)
    if options.markdown:
        print(markdown(rows()))
        return
    if options.recount:
        _keep(recount(rows()))
        return
    for case in cases():
        known = not options.again and any(case.matches(values) for values in rows())
        if known or options.only not in " ".join(map(str, case)):
            continue
        try:
            values = add(case, options.cache)
            found = f"{values['hbm_gib'] or 0:.2f} GiB, {'fits' if values['fits'] else 'does not fit'}"
            print(f"{' '.join(map(str, case))}: {found}, {values['planned_in']:.0f} s", flush=True)
        except (ValueError, RuntimeError, TimeoutError) as error:
            print(f"{' '.join(map(str, case))}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
