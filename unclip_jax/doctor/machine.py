"""Versions, memory, the cache of compiled programs, and disk. Where jax is broken, versions and disk still are told."""

import os
import platform
import re
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, suppress
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any

import unclip_jax
from unclip_jax.doctor.findings import Finding, in_words

SHOWN = ("jax", "jaxlib", "flax", "numpy")  # versions that are said even where nothing is wrong
LEAST_MEMORY, LEAST_DISK = 1.5 * 2**30, 0.5 * 2**30  # bytes: one picture of 1024 px, a cache and a few pictures
PLUGINS = {"gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin"), "tpu": ("libtpu",)}  # of which jax needs one
AGAIN = "then start Python again (in a notebook: restart the session)"


def versions() -> Iterator[Finding]:
    """Python and packages, each beside the oldest that this package supports."""
    needed = requirements()
    yield Finding("unclip_jax", "ok", f"{unclip_jax.__version__} in {Path(unclip_jax.__file__).parent}")
    python = platform.python_version()
    oldest = needed.pop("python", "0")
    old = release(python) < release(oldest)
    remedy = f"install Python {oldest} or newer, and this package there" if old else None
    yield Finding("python", "wrong" if old else "ok", f"{python} on {platform.platform()}", remedy)
    for package in dict.fromkeys((*SHOWN, *needed)):
        found, least = version_of(package), needed.get(package)
        if found is None:
            yield Finding(package, "wrong", "is not installed", f"pip install '{package}>={least or 0}', {AGAIN}")
        elif least and release(found) < release(least):
            said = f"{found} is older than {least}, the oldest that is supported"
            yield Finding(package, "wrong", said, f"pip install -U '{package}>={least}', {AGAIN}")
        elif package in SHOWN:
            yield Finding(package, "ok", f"{found} ({least} or newer)" if least else found)
    yield from _plugins()


def _plugins() -> Iterator[Finding]:
    """CUDA plugins of other versions than jaxlib's, which jax does not load."""
    jaxlib = version_of("jaxlib")
    for package in PLUGINS["gpu"]:
        found = version_of(package)
        if found is not None and jaxlib is not None and release(found) != release(jaxlib):
            said = f"{found} does not belong to jaxlib {jaxlib}, so jax does not use it"
            extra = package.removeprefix("jax-").removesuffix("-plugin")
            yield Finding(package, "wrong", said, f"{install(extra)}, {AGAIN}")


def requirements() -> dict[str, str]:
    """The oldest supported version of Python and of each package: as the checkout says, else as installed."""
    project = Path(unclip_jax.__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        lines, python = table["dependencies"], table["requires-python"]
    else:
        installed = metadata.metadata("unclip-jax")
        lines, python = installed.get_all("Requires-Dist") or [], installed["Requires-Python"] or ""
    found = {"python": python.removeprefix(">=")}
    for text in lines:
        if match := re.fullmatch(r"([\w.-]+)>=([\w.]+)", text.replace(" ", "")):  # none of those of an extra
            found[match[1]] = match[2]
    return found


def version_of(package: str) -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, without zeros at their end."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, re.sub(r"(\.0)+$", "", match[0]).split("."))) if match else ()


def install(extra: str) -> str:
    """The command that installs jax for an accelerator, at the version that there is."""
    found = version_of("jax")
    return f"pip install -U 'jax[{extra}]{'' if found is None else f'=={found}'}'"


def memory() -> Iterator[Finding]:
    """Memory of the device and of the host."""
    import jax

    from unclip_jax.offload import device_memory

    total, free = _host_memory()
    if free is not None:
        low = free < LEAST_MEMORY
        remedy = "end other programs, or ask for pictures of at most 256 px" if low else None
        said = f"{in_words(free)} of the host's {in_words(total)} are free"
        figures = {"total_bytes": total, "free_bytes": free}
        yield Finding("memory", "note" if low else "ok", said, remedy, figures)
    device: Any = jax.local_devices()[0]
    if device.platform != "cpu":
        bound = device_memory()
        said = "the device does not say" if bound is None else f"{in_words(bound)} of the device are jax's"
        yield Finding("device memory", "ok", said, figures={"bytes": bound})


def _host_memory() -> tuple[int | None, int | None]:
    """Bytes that the host has, and that programs can still get; a container's limit bounds both."""
    table = Path("/proc/meminfo")
    if not table.is_file():
        with suppress(ValueError, OSError, AttributeError):
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return total, total
        return None, None
    rows = dict(line.split(":") for line in table.read_text().splitlines())
    total, free = (1024 * int(rows[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        total, free = min(total, limit), min(free, limit - int((group / "memory.current").read_text()))
    return total, free


def cache() -> Iterator[Finding]:
    """Where compiled programs are kept between runs."""
    import jax

    from unclip_jax import compile_cache

    chosen = jax.config.values["jax_compilation_cache_dir"]
    folder = Path(
        chosen or Path(os.environ.get("UNCLIP_CACHE_DIR") or compile_cache.user_cache()) / compile_cache.machine()
    )
    name = "JAX_COMPILATION_CACHE_DIR" if chosen else "UNCLIP_CACHE_DIR"
    remedy = f"export {name}=FOLDER, one that can be written: without it every run compiles anew"
    with redirect_stderr(StringIO()):  # what enable prints is a finding here
        kept = compile_cache.enable()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.tmp"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        said = f"{folder} cannot be written ({error.strerror})"
        yield Finding("compile cache", "wrong", said, remedy, {"folder": str(folder)})
        return
    files = [path for path in folder.rglob("*") if path.is_file()]
    programs, size = sum(path.name.endswith("-cache") for path in files), sum(path.stat().st_size for path in files)
    said = f"{programs} programs, {in_words(size)} in {kept or folder}"
    figures = {"folder": str(folder), "programs": programs, "bytes": size}
    if chosen and jax.config.values["jax_persistent_cache_min_compile_time_secs"] > 0:
        remedy = "export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0"
        yield Finding("compile cache", "note", f"{said}, which leaves out those that compile fast", remedy, figures)
    else:
        yield Finding("compile cache", "ok", said, figures=figures)


def disk() -> Iterator[Finding]:
    """Free space here."""
    free = shutil.disk_usage(Path.cwd()).free
    low = free < LEAST_DISK
    remedy = "free some, or work in a folder on another disk" if low else None
    yield Finding(
        "disk", "wrong" if low else "ok", f"{in_words(free)} free in {Path.cwd()}", remedy, {"free_bytes": free}
    )
