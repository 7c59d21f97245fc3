"""What is to be planned, and what came of compiling it: the two records that a plan's processes exchange."""

import hashlib
import json
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from unclip_jax.checkpoint.schema import from_json, to_json
from unclip_jax.config import ClipConfig, TrainConfig
from unclip_jax.plan.slices import Slice, parse_slice

_PLAN = ("plan/steps.py", "plan/worker.py", "plan/flops.py", "plan/dump.py")
_SOURCES = ("models", "diffusion", "sharding", "stages.py", "train.py", "optim.py", "generate.py", "priors.py", *_PLAN)


class Request(NamedTuple):
    """One compilation.

    slice: None for the devices that are here. strategy: a name or mixture, as `sharding.resolve` reads it.
    batch: global, 0 for one per device. depth: "trace" compiles nothing, "memory" stops after buffer assignment,
    "full" goes on to an executable.
    """

    config: TrainConfig
    clip: ClipConfig | None
    what: str
    slice: Slice | None
    strategy: str
    batch: int
    depth: str = "memory"

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        values = self._asdict()
        values["config"] = to_json(self.config)
        values["clip"] = None if self.clip is None else to_json(self.clip)
        values["slice"] = None if self.slice is None else self.slice.name
        return values

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Request":
        """The request that to_json gave."""
        values = dict(values, config=from_json(values["config"]))
        values["clip"] = values["clip"] and from_json(values["clip"])
        values["slice"] = values["slice"] and parse_slice(values["slice"])
        return Request(**values)

    def digest(self) -> str:
        """A name for its result that changes with whatever could change it: sizes, versions, the package's sources."""
        # What a run logs and keeps does not change its step.
        plain = replace(self.config, name="", steps=0, seed=0, log_every=1, preview_every=1, save_every=1, tags={})
        text = json.dumps([self._replace(config=plain).to_json(), _versions(), _sources()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _versions() -> list[str]:
    def known(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    return [known(name) for name in ("jax", "jaxlib", "libtpu", "flax", "optax")]


@cache
def _sources() -> str:
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for name in _SOURCES:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
