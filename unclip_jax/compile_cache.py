"""Compiled programs kept between runs, so that a second run starts at once."""

import hashlib
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import jax


def enable(path: Path | None = None) -> Path | None:
    """Keeps every compiled program in `path` and returns the folder in use, or None where none can be written.

    The default is UNCLIP_CACHE_DIR, else the user's cache folder, in a subfolder for these versions and this processor.
    A cache that the user chose through JAX itself (JAX_COMPILATION_CACHE_DIR) stays as it is.
    """
    if chosen := jax.config.values["jax_compilation_cache_dir"]:
        return Path(chosen)
    folder = path or Path(os.environ.get("UNCLIP_CACHE_DIR") or user_cache()) / machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        print(f"unclip: warning: compiled programs are not kept for the next run ({error})", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def user_cache() -> Path:
    """The folder in which this system's programs keep what they can make again."""
    match sys.platform:
        case "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
        case "darwin":
            base = Path.home() / "Library/Caches"
        case _:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "unclip_jax"


def machine() -> str:
    """A folder name that changes with whatever makes a compiled program unusable: versions, platform, processor."""
    features = hashlib.sha256(_processor().encode()).hexdigest()[:8]
    return f"jax{version('jax')}-jaxlib{version('jaxlib')}-{sys.platform}-{platform.machine()}-{features}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    # One processor's worth: flags on x86, Features on Arm.
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
