"""What jax computes on, and the accelerators that this machine has and jax does not use."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from unclip_jax.doctor.findings import Finding, State, sentence
from unclip_jax.doctor.machine import AGAIN, PLUGINS, install, release, version_of


def devices() -> Iterator[Finding]:
    """What jax computes on, and accelerators that this machine has and jax does not see."""
    import jax
    import jax.numpy as jnp

    shown = accelerators()
    try:
        found = jax.local_devices()
        total = float(jnp.ones((64, 64)).sum())
    except Exception as error:
        kind = next((kind for kind in shown if kind in str(error).lower()), "tpu" if "tpu" in shown else "gpu")
        busy = "end the other process that uses it (in a notebook: shut the other session down)"
        remedy = busy if "in use" in str(error) else _unseen(kind)[1] if shown else "unset JAX_PLATFORMS"
        yield Finding("devices", "wrong", f"jax finds none: {sentence(error)}", remedy)
        return
    kinds = {device.device_kind for device in found}
    said = f"{len(found)} x {', '.join(sorted(kinds))} ({found[0].platform})"
    if total != 64 * 64:
        yield Finding("devices", "wrong", f"{said} adds up 4096 ones to {total}", "restart the machine, or use another")
        return
    seen = {device.platform for device in found}
    yield Finding("devices", "ok", said, figures={"platform": found[0].platform, "count": len(found)})
    for kind, what in shown.items():
        if kind not in seen:
            state, remedy = _unseen(kind)
            yield Finding(
                "accelerator", state, f"this machine has a {kind.upper()} ({what}), and jax does not use it", remedy
            )


def accelerators() -> dict[str, str]:
    """GPUs and TPUs that the operating system or the runtime shows, by jax's name of their kind: what shows them."""
    found = {}
    if (name := _nvidia()) is not None:
        found["gpu"] = name
    chips = [path.as_posix() for path in sorted(Path("/dev").glob("accel[0-9]*"))]
    told = [name for name in ("COLAB_TPU_ADDR", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID") if os.environ.get(name)]
    if chips or told:
        found["tpu"] = ", ".join(chips or told)
    return found


def _nvidia() -> str | None:
    """Name and driver of the first NVIDIA GPU."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        ask = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
            if answer:
                return answer.splitlines()[0].replace(", ", ", driver ")
    return "/dev/nvidia0" if Path("/dev/nvidia0").exists() else None


def _unseen(kind: str) -> tuple[State, str]:
    """Whether it is wrong that jax does not use an accelerator, and what to do."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    names = {"gpu": ("cuda", "gpu"), "tpu": ("tpu",)}[kind]
    if chosen and not any(name in chosen.lower() for name in names):
        return "note", f"unset JAX_PLATFORMS (it is '{chosen}'), if this is not on purpose"
    if kind == "gpu" and os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return "note", "unset CUDA_VISIBLE_DEVICES, if this is not on purpose"
    plugins = [found for package in PLUGINS[kind] if (found := version_of(package)) is not None]
    jaxlib = version_of("jaxlib") or ""
    if not plugins or (kind == "gpu" and release(plugins[0]) != release(jaxlib)):
        return "wrong", f"{install({'gpu': 'cuda12', 'tpu': 'tpu'}[kind])}, {AGAIN}"
    if kind == "gpu":
        return (
            "wrong",
            "update its driver (CUDA 12 needs 525 or newer), and unset LD_LIBRARY_PATH, which hides jax's CUDA",
        )
    return "wrong", f"pip install -U 'jax[tpu]', {AGAIN}; a TPU of another process is free when that has ended"
