"""What is measured: every combination of devices, strategy, batch and recomputation, fewest devices first."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from unclip_jax.config import (
    ArPriorConfig,
    ClipConfig,
    DecoderConfig,
    PriorConfig,
    Remat,
    TrainConfig,
    UpsamplerConfig,
    with_remat,
)
from unclip_jax.sharding import NAMES, Strategy, abstract_mesh, check_batch_size, resolve


class Here(NamedTuple):
    """The devices at hand: how many, of what kind and platform, in how many slices of a pod."""

    devices: int
    kind: str
    platform: str
    slices: int = 1


class Case(NamedTuple):
    """One combination; batch is global. Its fields are among those of its row."""

    devices: int
    strategy: str
    batch: int
    remat: Remat


def all_cases(
    config: TrainConfig,
    here: Here,
    devices: Sequence[int],
    strategies: Sequence[str],
    batches: Sequence[int],
    remats: Sequence[Remat],
) -> list[Case]:
    """Every combination once: names of one mesh count as one, and a single device has no strategy but dp.

    Raises ValueError, in one sentence with what there is, for more devices than there are, for a strategy that is
    unknown, and for a batch that divides over no mesh.
    """
    for count in devices:
        if not 1 <= count <= here.devices:
            raise ValueError(f"there are {here.devices} devices here, not {count}: --devices takes 1 to {here.devices}")
    for strategy in strategies:
        axes = {part.partition("=")[0].strip() for part in strategy.split(",")}
        if strategy.strip().lower() not in NAMES and not axes <= set(Strategy._fields):
            resolve(strategy, here.devices, here.slices)  # says what there is
    cases: dict[Any, Case] = {}
    for count in sorted(set(devices)):
        for strategy in strategies if count > 1 else ("dp",):
            for batch in batches:
                for remat in remats:
                    case = Case(count, strategy, batch, remat)
                    cases.setdefault((_mesh(case, here) or strategy, count, batch, remat), case)
    for batch in batches:
        found = [mesh for case in cases.values() if case.batch == batch and (mesh := _mesh(case, here))]
        if found and all(_undivided(batch, mesh, config.optim.accumulate) for mesh in found):
            raise ValueError(_undivided(batch, min(found, key=lambda mesh: mesh[:2]), config.optim.accumulate))
    return list(cases.values())


def refusal(case: Case, config: TrainConfig, here: Here) -> str | None:
    """Why arithmetic alone refuses a case, None where it does not."""
    try:
        mesh = resolve(case.strategy, case.devices, _slices(case, here))
    except ValueError as error:
        return str(error)
    return _undivided(case.batch, mesh, config.optim.accumulate)


def _mesh(case: Case, here: Here) -> Strategy | None:
    try:
        return resolve(case.strategy, case.devices, _slices(case, here))
    except ValueError:
        return None


def _slices(case: Case, here: Here) -> int:
    return here.slices if case.devices == here.devices else 1


def _undivided(batch: int, mesh: Strategy, accumulate: int) -> str | None:
    try:
        check_batch_size(batch, abstract_mesh(mesh), accumulate)
    except ValueError as error:
        return str(error)
    return None


def remat_of(config: TrainConfig) -> Remat:
    """What the blocks of a config keep for the backward pass."""
    if config.remat is not None:
        return config.remat
    match config.network:
        case ClipConfig(vision=part) | PriorConfig(transformer=part) | ArPriorConfig(transformer=part):
            return part.remat
        case DecoderConfig(unet=part) | UpsamplerConfig(unet=part):
            return part.remat


def config_of(config: TrainConfig, case: Case) -> TrainConfig:
    """The config that a case trains."""
    if case.remat != remat_of(config):
        config = replace(config, remat=case.remat, network=with_remat(config.network, case.remat))
    return replace(config, strategy=case.strategy, data=replace(config.data, batch_size=case.batch))
