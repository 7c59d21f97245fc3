"""What `plan` says of a case, where it knows the chip."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unclip_jax.bench.cases import Case, Here, config_of
from unclip_jax.config import ClipConfig, TrainConfig
from unclip_jax.plan.report import make_plan
from unclip_jax.plan.request import Request
from unclip_jax.plan.slices import GENERATIONS, Slice, all_slices

_KINDS = {
    "TPU v4": "v4", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}  # fmt: skip


def slice_of(here: Here, devices: int) -> Slice | None:
    """The TPU slice that so many of these devices are, None where there is none or plan does not know them."""
    count = here.slices if devices == here.devices else 1
    known = all_slices(GENERATIONS[_KINDS[here.kind]]) if here.kind in _KINDS else []
    return next((one._replace(count=count) for one in known if one.chips * count == devices), None)


def predictor(
    config: TrainConfig, clip: ClipConfig | None, here: Here, cache: Path | None = None
) -> Callable[[Case], dict[str, Any]]:
    """A function from a case to its predicted step in seconds and memory in bytes; {} where nothing is known."""

    def predict(case: Case) -> dict[str, Any]:
        place = slice_of(here, case.devices)
        if place is None:
            return {}
        request = Request(config_of(config, case), clip, "train", place, case.strategy, case.batch)
        try:
            plan = make_plan(request, cache)
        except (ValueError, RuntimeError, TimeoutError, ModuleNotFoundError) as error:
            print(f"  no plan: {error}", file=sys.stderr)
            return {}
        memory, needs = plan.compiled.memory, plan.compiled.needs
        step = plan.roofline and plan.roofline.step
        return {"plan_step": step, "plan_memory_bytes": memory.total if memory else needs, "plan_fits": plan.fits}

    return predict
