"""What the TPU compiler wrote about a program: memory, collectives, FLOPs and HBM traffic, from its own text.

jax's own readers of compiled programs count loops once, and fail on some of libtpu's instructions.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from unclip_jax.plan.flops import taps

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ((?:\(.*?\)|\S+)) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_SILENT = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}


class Instruction(NamedTuple):
    """One line of HLO: name, opcode, the text of its shape, and everything after the opening parenthesis."""

    name: str
    opcode: str
    shape: str
    rest: str


class Collective(NamedTuple):
    """Collectives of one kind among groups of one size: how many, and their bytes, per chip and step.

    bytes: of the whole array, as gathered, before it is scattered, or as it is reduced or sent. first: devices of the
    first group, by their place in the mesh. asynchronous: whether the chip computes meanwhile.
    """

    kind: str
    group: int
    count: float
    bytes: float
    first: tuple[int, ...]
    asynchronous: bool = False

    @property
    def wire(self) -> float:
        """Bytes that leave each chip when they travel around a ring."""
        share = (self.group - 1) / self.group
        match self.kind:
            case "all-reduce":
                return 2 * share * self.bytes
            case "collective-permute":
                return float(self.bytes)
            case _:
                return share * self.bytes


class Memory(NamedTuple):
    """Bytes of HBM per chip: all that the compiler allocates, the arguments in it, and the rest at its peak.

    arguments: by the first part of their name. saved: the share of the rest that the forward pass made.
    largest: the biggest buffers at the peak, as text.
    """

    total: float
    arguments: dict[str, float]
    saved: float
    largest: tuple[str, ...]


class Program(NamedTuple):
    """flops and traffic (HBM bytes read and written, at most) per chip; collectives per chip."""

    flops: float
    traffic: float
    collectives: tuple[Collective, ...]


def read_program(lines: Iterable[str], trips: int = 1) -> Program:
    """A program of HLO text; trips: iterations of loops that do not say how many."""
    computations, entry = _computations(lines)
    times = _times(computations, entry, trips)
    fused = _inlined(computations)
    flops = traffic = 0.0
    # A fused asynchronous collective is written out once per step that it is spread over, all of one chain or name.
    # Channels tell nothing: many collectives share the first.
    found: dict[tuple[str, ...], tuple[Collective, float]] = {}
    for name, body in computations.items():
        if not times[name]:
            continue
        shapes = {instruction.name: instruction.shape for instruction in body}
        for instruction in body:
            if instruction.opcode == "convolution":
                flops += times[name] * _convolution(instruction, shapes)
            elif instruction.opcode == "dot":
                flops += times[name] * _dot(instruction, shapes)
            elif instruction.opcode.removesuffix("-start") in KINDS:
                steps = re.search(r'(chain_id|async_collective_name)="([^"]*)"', instruction.rest)
                one = _collective(instruction, shapes, "all-reduce-scatter" in name, steps is not None)
                key = steps.groups() if steps else (name, instruction.name)
                known = found.get(key)
                if one.group > 1 and (known is None or one.bytes * times[name] > known[0].bytes * known[1]):
                    found[key] = one, times[name]
            if name not in fused and instruction.opcode not in _SILENT and not instruction.opcode.endswith("-done"):
                traffic += times[name] * _traffic(instruction, shapes)
    total: dict[Collective, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one, runs in found.values():
        like = one._replace(count=0.0, bytes=0.0)
        total[like][0] += runs
        total[like][1] += runs * one.bytes
    collectives = [like._replace(count=count, bytes=size) for like, (count, size) in total.items()]
    return Program(flops, traffic, tuple(sorted(collectives)))


def _collective(one: Instruction, shapes: dict[str, str], scatters: bool, spread: bool) -> Collective:
    """One collective; scatters: as part of a fusion that keeps a part of the sum. spread: over steps of a chain."""
    kind = one.opcode.removesuffix("-start")
    group, first = _groups(one.rest)
    given = sum(_size(shapes.get(name, "")) for name in _operands(one))
    made = _size(one.shape) - (given if one.opcode.endswith("-start") else 0)  # what is under way names both
    size = given if kind == "collective-permute" else max(given, made)
    kind = "reduce-scatter" if scatters and kind == "all-reduce" else kind
    return Collective(kind, group, 1, size, first, spread or one.opcode.endswith("-start"))


def read_total(report: Path) -> float:
    """Bytes of HBM in a memory usage report, 0 where it does not say."""
    total = re.search(r"color=0\)\s+Total bytes: (\d+)", report.read_text())
    return float(total[1]) if total else 0.0


def read_memory(folder: Path, names: Sequence[str] = ()) -> Memory:
    """The memory of the program whose dump lies in a folder, at the compiler's peak; names: of its arguments in order.

    Where there are thousands of them jax hands them over as one tuple, and the program has no names of its own.
    """
    total = read_total(next(folder.glob("*memory-usage-report.txt")))
    if not total:
        raise ValueError("the compiler's memory report names no total: this libtpu writes another format")
    sizes: dict[tuple[int, str], float] = {}
    with next(folder.glob("*after_optimizations-buffer-assignment.txt")).open() as lines:
        for line in lines:
            if match := re.match(r"allocation \d+: size (\d+), parameter (\d+),.* ShapeIndex \{(\d*)\}", line):
                sizes[int(match[2]), match[3]] = float(match[1])
    with next(folder.glob("*after_optimizations.txt")).open() as lines:
        computations, entry = _computations(lines)
    arguments: dict[str, float] = defaultdict(float)
    # Constants that jax turned into arguments come first.
    first = sum(len(_shapes(one.shape)) for one in computations[entry] if one.opcode == "parameter") - len(names)
    for (number, place), size in sizes.items():
        at = (int(place) if place else number) - first
        arguments[names[at] if 0 <= at < len(names) else "other"] += size
    with next(folder.glob("*after_optimizations-live-range.txt")).open() as lines:
        saved, largest = _peak(_alive(lines), computations, entry)
    return Memory(total, dict(arguments), saved, largest)


def _alive(lines: Iterable[str]) -> dict[tuple[str, tuple[int, ...]], float]:
    """Bytes of every value at the peak, by the instruction that defines it and its place in that one's tuple."""
    alive: dict[tuple[str, tuple[int, ...]], float] = defaultdict(float)
    inside = False
    for line in lines:
        if inside and (match := re.match(r"\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes", line)):
            alive[match[1], tuple(map(int, match[2].split(","))) if match[2] else ()] += float(match[3])
        elif inside:
            break
        inside = inside or "(peak):" in line
    return alive


def _peak(
    alive: dict[tuple[str, tuple[int, ...]], float], computations: dict[str, list[Instruction]], entry: str
) -> tuple[float, tuple[str, ...]]:
    """Which share of what is alive at the peak, besides arguments, the forward pass made; and the largest buffers."""
    places = {one.name: (name, one) for name, body in computations.items() for one in body}
    loops = {
        part: one
        for body in computations.values()
        for one in body
        if one.opcode == "while"
        for part in re.findall(r"(?:body|condition)=%?([\w.\-]+)", one.rest)
    }
    made, rest, texts, parts = 0.0, 0.0, {}, {}
    for (name, index), size in alive.items():
        if name not in places:
            continue
        computation, source = _source(name, index, places, loops)
        origin = re.search(r'op_name="([^"]*)"', source.rest)
        path = origin[1] if origin else source.opcode
        if name not in parts:  # some have thousands
            parts[name] = _shapes(places[name][1].shape)
        shapes = parts[name]
        kind, sides, _ = shapes[index[0] if index and index[0] < len(shapes) else 0]
        texts[name, index] = f"{size / 2**20:.0f} MiB {kind}[{','.join(map(str, sides))}] {path}"
        if source.opcode == "parameter" and computation == entry:
            continue
        rest += size
        made += size * ("jvp(" in path and "transpose(" not in path and "rematted" not in path)
    largest = sorted(texts, key=lambda key: -alive[key])[:8]
    return made / max(rest, 1.0), tuple(texts[key] for key in largest)


def _source(
    name: str,
    index: tuple[int, ...],
    places: dict[str, tuple[str, Instruction]],
    loops: dict[str, Instruction],
) -> tuple[str, Instruction]:
    """The instruction that made a value, and its computation: what a loop carries was made before the loop."""
    while True:
        computation, one = places[name]
        operands = _operands(one)
        if one.opcode == "parameter" and computation in loops:
            name = _operands(loops[computation])[0]
        elif one.opcode == "get-tuple-element":
            name, index = operands[0], (int(re.findall(r"index=(\d+)", one.rest)[0]), *index)
        elif one.opcode == "tuple" and index:
            name, index = operands[index[0]], index[1:]
        elif one.opcode in ("bitcast", "copy") and operands:
            name = operands[0]
        else:
            return computation, one


def cycles(lines: Iterable[str], kernels: Mapping[str, float], trips: int = 1) -> float:
    """The compiler's estimate of the cycles of a program of HLO text after code generation, loops multiplied out.

    kernels: cycles of Pallas calls, of which the compiler estimates none, by name. ValueError: it lacks one.
    """
    computations, entry = _computations(lines)
    times = _times(computations, entry, trips)
    fused = _inlined(computations)
    total = 0.0
    for name, body in computations.items():
        for one in body if times[name] and name not in fused else ():
            found = re.search(r'"?estimated_cycles"?:"?(\d+)', one.rest)
            if found is None and "tpu_custom_call" in one.rest:
                if one.name not in kernels:
                    raise ValueError(f"nothing says how many cycles the kernel {one.name} takes")
                total += times[name] * kernels[one.name]
            total += times[name] * float(found[1]) if found else 0.0
    return total


def _computations(lines: Iterable[str]) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", []
    for line in lines:
        if line.startswith(" "):
            if match := _INSTRUCTION.match(line):
                body.append(Instruction(match[1], match[3], match[2], match[4]))
        elif match := _COMPUTATION.match(line):
            body = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
    return computations, entry


def _inlined(computations: dict[str, list[Instruction]]) -> set[str]:
    """Computations that are part of one instruction: of fusions, and what reductions apply."""
    called = set()
    for body in computations.values():
        for one in body:
            attribute = "calls|to_apply" if one.opcode == "fusion" else "to_apply"
            called.update(re.findall(rf"(?:{attribute})=%?([\w.\-]+)", one.rest) if one.opcode != "call" else ())
    return called


def _times(computations: dict[str, list[Instruction]], entry: str, trips: int) -> Counter[str]:
    """How often each computation runs, its callers' loops multiplied out; 0 for those never called."""
    times: Counter[str] = Counter({entry: 1})
    # Callees stand before their callers in HLO text.
    for name in reversed(list(computations)):
        for one in computations[name] if times[name] else ():
            for attribute, group, single in re.findall(
                r"(calls|to_apply|body|branch_computations|true_computation|false_computation|called_computations)="
                r"(?:\{([^}]*)\}|%?([\w.\-]+))",
                one.rest,
            ):
                loops = _trip_count(computations, one.rest, trips) if attribute == "body" else 1
                for called in re.findall(r"[\w.\-]+", group or single):
                    times[called] += times[name] * loops
    return times


def _trip_count(computations: dict[str, list[Instruction]], rest: str, trips: int) -> int:
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    body = computations.get(condition[1], []) if condition else []
    numbers = [int(one.rest.split(")")[0]) for one in body if one.opcode == "constant" and re.match(r"\d+\)", one.rest)]
    return max(numbers) if numbers else trips


def _shapes(text: str) -> list[tuple[str, tuple[int, ...], str]]:
    return [(t, tuple(map(int, dims.split(","))) if dims else (), layout) for t, dims, layout in _SHAPE.findall(text)]


def _size(text: str, hbm: bool = False) -> float:
    """Bytes of a shape or tuple; hbm: only of what lies there, and not in a memory space on the chip."""
    shapes = [(kind, dims) for kind, dims, layout in _shapes(text) if not (hbm and "S(" in layout)]
    return float(sum(math.prod(dims) * BYTES.get(kind, 1) for kind, dims in shapes))


def _operands(instruction: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split("), ")[0])


def _traffic(instruction: Instruction, shapes: dict[str, str]) -> float:
    written = _size(instruction.shape, hbm=True)
    if instruction.opcode.endswith("-start"):
        return written
    return written + sum(_size(shapes.get(name, ""), hbm=True) for name in set(_operands(instruction)))


def _groups(rest: str) -> tuple[int, tuple[int, ...]]:
    """Size and members of the first group of a collective, in any of the ways in which HLO writes them.

    {{0,1},{2,3}}; [4,2]<=[2,4]T(1,0), a count that is reshaped, transposed and cut into rows; or
    mesh['a'=4,'b'=2] {'a'}, axes of a row-major mesh, of which 'a':(2)2 is a part: the size before it, and its own.
    """
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        first = tuple(map(int, match[1].split(",")))
    elif match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        sides = list(map(int, match[3].split(",")))
        order = list(map(int, match[4].split(","))) if match[4] else list(range(len(sides)))
        first = tuple(_count(sides, order, int(match[2])))
    elif match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        sides, order = [], []
        for name, size in sizes.items():
            part = re.search(rf"'{re.escape(name)}'(?::\((\d+)\)(\d+))?", match[2])
            cut = (1, size) if part is None or part[1] is None else (int(part[1]), int(part[2]))
            sides += [cut[0], cut[1], size // (cut[0] * cut[1])]
            order += [len(sides) - 2] if part is not None else []
        first = tuple(_count(sides, order, math.prod(sides[axis] for axis in order)))
    elif match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        first = (int(match[1]), int(match[2]))
    else:
        first = (0,)
    return len(first), first


def _count(sides: list[int], order: list[int], length: int) -> list[int]:
    """The first places of a row-major grid, counted along its axes in an order of which the last turns fastest."""
    strides = [math.prod(sides[axis + 1 :]) for axis in range(len(sides))]
    places = []
    for count in range(length):
        place = 0
        for axis in reversed(order):
            count, digit = divmod(count, sides[axis])
            place += digit * strides[axis]
        places.append(place)
    return places


def _window(text: str, key: str, count: int, default: str) -> list[str]:
    match = re.search(rf"\b{key}=([\dx_\-]+)", text)
    return match[1].split("x") if match else [default] * count


def _convolution(one: Instruction, shapes: dict[str, str]) -> float:
    """Two per multiplication that meets a value; libtpu writes matrix products as convolutions too."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    operands = _operands(one)
    if labels is None or len(operands) < 2:
        return 0.0
    left, right = (_shapes(shapes.get(name, ""))[0][1] for name in operands[:2])
    out = _shapes(one.shape)[0][1]
    features = right[labels[2].index("i")]
    total = 2.0 * features * out[labels[3].index("b")] * out[labels[3].index("f")]
    spatial = sorted(label for label in labels[1] if label.isdigit())
    match = re.search(r"window=\{([^}]*)\}", one.rest)
    window, n = match[1] if match else "", len(spatial)
    strides, pads = _window(window, "stride", n, "1"), _window(window, "pad", n, "0_0")
    spread, dilation = _window(window, "lhs_dilate", n, "1"), _window(window, "rhs_dilate", n, "1")
    for axis, label in enumerate(spatial):
        total *= taps(
            out[labels[3].index(label)],
            right[labels[2].index(label)],
            left[labels[1].index(label)],
            int(strides[axis]),
            int(pads[axis].split("_")[0]),
            int(spread[axis]),
            int(dilation[axis]),
        )
    return total


def _dot(one: Instruction, shapes: dict[str, str]) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    left = _shapes(shapes.get(_operands(one)[0], ""))
    if contracted is None or not left:
        return 0.0
    depth = math.prod(left[0][1][int(axis)] for axis in contracted[1].split(",") if axis)
    return 2.0 * math.prod(_shapes(one.shape)[0][1]) * depth
