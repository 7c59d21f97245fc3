"""What this machine has, whether every stage works on it, what is wrong, and the command that mends it."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from unclip_jax.doctor.accelerators import devices
from unclip_jax.doctor.findings import Finding, Report, sentence
from unclip_jax.doctor.machine import AGAIN, cache, disk, memory, versions

SHIPPED = Path(__file__).parents[1] / "weights"  # cascade's, which cannot be asked where jax is broken

__all__ = ["Finding", "Report", "examine"]


def examine(
    weights: str | Path | None = None, test: bool = True, say: Callable[[Finding], None] = lambda finding: None
) -> Report:
    """Everything there is to say about this machine; never raises.

    weights: a cascade beside the shipped one, as load_cascade takes it, and then the one that is tested. test: run
    every stage for a moment. say: is told of each finding as it is made. Every check is caught by itself. The cache of
    compiled programs is switched on, as commands do: what the test compiles is what sampling runs.
    """
    findings: list[Finding] = []
    sources = [SHIPPED] if weights is None else [SHIPPED, weights]
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [("versions", versions)]
    if _jax() is None:
        checks += [("devices", devices), ("memory", memory), ("compile cache", cache), ("disk", disk)]
        checks += [("weights", partial(_weights, source)) for source in sources]
        checks += [("stages", partial(_stages, sources[-1]))] if test else []
    else:
        checks += [("import jax", _broken), ("disk", disk)]
    for name, check in checks:
        for finding in _caught(name, check):
            findings.append(finding)
            say(finding)
    return Report(tuple(findings))


def _jax() -> Exception | None:
    """What importing jax raises, and with it all that computes; None where it works."""
    try:
        import jax  # noqa: F401
    except Exception as error:
        return error
    return None


def _broken() -> Iterator[Finding]:
    """jax that cannot be imported: devices, cache, weights and stages are not looked at."""
    error = _jax()
    if error is not None:
        remedy = f"pip install -U --force-reinstall jax jaxlib, {AGAIN}, and run unclip doctor again for the rest"
        yield Finding("import jax", "wrong", f"fails: {sentence(error)}", remedy)


def _weights(source: str | Path) -> Iterator[Finding]:
    from unclip_jax.doctor.selftest import weights_of

    yield from weights_of(source)


def _stages(source: str | Path) -> Iterator[Finding]:
    from unclip_jax.doctor.selftest import stages

    yield from stages(source)


def _caught(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # whatever a broken machine raises, the other checks go on
        remedy = "mend what stands above, then run unclip doctor again; else report it with this line"
        yield Finding(name, "wrong", f"could not be examined: {sentence(error)}", remedy)
