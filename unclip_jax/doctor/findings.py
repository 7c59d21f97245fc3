"""What a check says: findings, each with a remedy where something is wrong, and the report that they make."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

State = Literal["ok", "note", "wrong"]


class Finding(NamedTuple):
    """One thing that was looked at.

    said: one sentence. remedy: what to do where the state is not ok. figures: the same as numbers, for programs.
    """

    name: str
    state: State
    said: str
    remedy: str | None = None
    figures: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        text = f"{'WRONG' if self.state == 'wrong' else self.state:<7}{self.name:<17}{self.said}"
        return text if self.remedy is None else f"{text}\n{'':<24}do: {self.remedy}"


class Report(NamedTuple):
    """All findings, in the order in which they were made."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong; notes count as right."""
        return not any(finding.state == "wrong" for finding in self.findings)

    @property
    def summary(self) -> str:
        """One sentence."""
        wrong = sum(finding.state == "wrong" for finding in self.findings)
        match wrong:
            case 0:
                return "nothing is wrong"
            case 1:
                return "one thing is wrong: do what stands below it"
            case _:
                return f"{wrong} things are wrong: do what stands below each, from the first on"

    def __str__(self) -> str:
        return "\n".join([*map(str, self.findings), self.summary])

    def to_json(self) -> dict[str, Any]:
        """As `unclip doctor --json` prints it."""
        rows = [finding._asdict() | {"figures": dict(finding.figures or {})} for finding in self.findings]
        return {"healthy": self.healthy, "findings": rows}


def sentence(error: BaseException) -> str:
    """An error's message, with its kind where that says more than the message."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


def in_words(count: int | float | None) -> str:
    """A number of bytes."""
    if count is None:
        return "-"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
