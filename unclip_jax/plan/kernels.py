"""How long Pallas kernels run: libtpu estimates no cycles of them, but writes down the bundles that a chip issues.

One very long instruction word, a bundle, is issued per cycle. Loops whose number of rounds is known are multiplied out;
everything in their bodies counts, so that a kernel takes at most as long, unless it waits for memory.
"""

import re
from collections.abc import Iterable
from pathlib import Path

_BUNDLE = re.compile(r"\s*(?:0x)?([0-9a-f]+)\s+(?:[A-Z]{2})?\s*:\s*((?:> ?)*)\{(?!\})")
_STAGE = re.compile(r"iteration index, stage = (\d+)")
_ROUNDS = re.compile(r"totalorder \S+ (\d+) /\* loop exit test")


def asking(folder: Path) -> str:
    """LIBTPU_INIT_ARGS with which libtpu writes the bundles of everything that it compiles into a folder."""
    told = {"dump_to": folder, "dump_llo_text": "true", "dump_llo_pass_label_regex": ".*final_bundles.*"}
    return " ".join(f"--xla_jf_{name}={value}" for name, value in told.items())


def read_bundles(folder: Path) -> dict[str, float]:
    """Cycles of every instruction whose bundles lie in a folder, by its name in the program."""
    found = {}
    for path in folder.glob("*-final_bundles.txt"):
        name = re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", path.name)
        if name:
            with path.open() as lines:
                found[name[1]] = count_bundles(lines)
    return found


def count_bundles(lines: Iterable[str]) -> float:
    """Bundles of a schedule, those in loops times their rounds; as many marks > stand before one as loops around it.

    A pipelined loop has a round more per stage after the first, to fill up and to run empty: they compute nothing.
    """
    counts, rounds, stages = [0.0], [1], [0]  # of what is outside, and of every loop around

    def close(depth: int) -> None:
        while len(counts) > depth + 1:
            done = counts.pop() * (rounds.pop() - stages.pop())
            counts[-1] += done

    for line in lines:
        if bundle := _BUNDLE.match(line):
            depth = bundle[2].count(">")
            close(depth)
            for _ in range(depth + 1 - len(counts)):
                counts.append(0.0)
                rounds.append(1)
                stages.append(0)
            counts[-1] += 1
        for stage in _STAGE.findall(line):
            stages[-1] = max(stages[-1], int(stage))
        if known := _ROUNDS.search(line):
            rounds[-1] = int(known[1])
    close(0)
    return counts[0]
