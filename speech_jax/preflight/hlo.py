"""What a compiled program moves, read from its HLO text: memory traffic and collectives.

XLA's own cost analysis counts a loop's body once; here it counts as often as it runs, where the
compiler knows how often that is.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"([a-z]+\d*)\w*\[([\d,]*)\](?:\{([^{}]*)\})?")
_COLLECTIVES = {
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
}  # fmt: skip
# These only name what is in memory already, or are counted by what they contain.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call",
    "after-all", "partition-id", "replica-id", "opt-barrier", "iota", "async-start",
    "async-update",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}


class Collective(NamedTuple):
    """One collective operation, as often as it runs."""

    kind: str
    times: int
    sent: float  # bytes that each device sends, each time, in a ring
    group: tuple[int, ...]  # the devices of the first group that takes part in it


class Traffic(NamedTuple):
    """What each device moves when the program runs once."""

    memory: float  # bytes read from and written to device memory, about
    collectives: list[Collective]
    unread: int = 0  # instructions that were not understood, and count for nothing


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str


def traffic(text: str, devices: int) -> Traffic:
    """Reads `compiled.as_text()` of a program for so many devices.

    Memory traffic is what each operation (or fusion of operations) reads and writes: slices count
    as what is sliced, and values that a TPU keeps on the chip do not count.
    """
    computations, entry, unread = _parse(text)
    memory, collectives = 0.0, []
    for name, times, fused in _runs(computations, entry):
        body = {instruction.name: instruction for instruction in computations[name]}
        for instruction in body.values():
            kind = instruction.opcode.removesuffix("-start")
            # What a new compiler writes differently must not hide what can be read.
            try:
                if kind in _COLLECTIVES:
                    # On TPU, a reduce-scatter is an all-reduce in a fusion that keeps a part of it.
                    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                        kind = "reduce-scatter"
                    collectives.append(_collective(instruction, kind, body, times, devices))
                if not fused:
                    memory += times * _accessed(instruction, body, computations)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                unread += 1
    return Traffic(memory, collectives, unread)


def products(text: str) -> float:
    """FLOPs of the matrix products and convolutions of a program, as its compiler left them.

    Those of a library that the program calls (cuBLAS, cuDNN) are not in its text.
    """
    computations, entry, _ = _parse(text)
    total = 0.0
    for name, times, _ in _runs(computations, entry):
        body = {instruction.name: instruction for instruction in computations[name]}
        total += sum(times * _product(instruction, body) for instruction in body.values())
    return total


def costs(text: str) -> dict[str, tuple[float, float]]:
    """Of each instruction that runs by itself: bytes it moves, FLOPs of the products in it."""
    computations, entry, _ = _parse(text)
    found = {}
    for name, _, fused in _runs(computations, entry):
        body = {instruction.name: instruction for instruction in computations[name]}
        for instruction in () if fused else body.values():
            inner = re.search(r"calls=%([\w.\-]+)", instruction.attributes)
            within = computations.get(inner[1], ()) if inner else (instruction,)
            scope = {one.name: one for one in within} if inner else body
            products = sum(_product(one, scope) for one in within)
            found[instruction.name] = (_accessed(instruction, body, computations), products)
    return found


def _product(instruction: _Instruction, body: dict[str, _Instruction]) -> float:
    attributes = instruction.attributes
    if instruction.opcode == "dot":
        shape = _dimensions(body[instruction.operands[0]].shape)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)[1]
        summed = math.prod(shape[int(axis)] for axis in contracted.split(",") if axis)
    elif instruction.opcode == "convolution":
        shape = _dimensions(body[instruction.operands[1]].shape)
        kernel = re.search(r"dim_labels=\w+_(\w+)->", attributes)[1]
        summed = math.prod(shape) / shape[kernel.index("o")]
    else:
        return 0.0
    return 2.0 * math.prod(_dimensions(instruction.shape)) * summed


def _dimensions(shape: str) -> list[int]:
    return [int(size) for size in _SHAPE.search(shape)[2].split(",") if size]


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str, int]:
    """Computations by name, which of them is the entry, and how many lines were not understood."""
    computations, current, entry, unread = {}, None, "", 0
    for line in text.splitlines():
        if line.endswith("{") and " -> " in line and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            current = computations.setdefault(name, [])
            entry = name if line.startswith("ENTRY") else entry
        elif current is not None and line.startswith(" ") and " = " in line:
            try:
                current.append(_instruction(line))
            except (IndexError, ValueError):
                unread += 1
    return computations, entry, unread


def _instruction(line: str) -> _Instruction:
    left, _, right = line.strip().partition(" = ")
    end = _closing(right) if right.startswith("(") else right.index(" ")
    shape, right = right[:end], right[end:].strip()
    opcode, _, right = right.partition("(")
    end = _closing("(" + right) - 1
    operands = re.findall(r"%([\w.\-]+)", right[:end])
    return _Instruction(left.split()[-1].lstrip("%"), shape, opcode, operands, right)


def _closing(text: str) -> int:
    """The place after the bracket that closes the one `text` begins with."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _runs(computations, entry: str, times: int = 1, fused: bool = False) -> Iterator:
    """(computation, how often it runs, whether it is a part of a fusion), from the entry down."""
    if entry not in computations:
        return
    yield entry, times, fused
    for instruction in computations[entry]:
        attributes, opcode = instruction.attributes, instruction.opcode
        if opcode == "while":
            condition, names = (
                re.findall(rf"{part}=%([\w.\-]+)", attributes) for part in ("condition", "body")
            )
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', attributes)
            below = computations.get(condition[0], []) if condition else []
            loops = int(known[1]) if known else _trips(below)
        elif opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", attributes)
            pattern = r"%([\w.\-]+)" if branches else r"(?:true|false)_computation=%([\w.\-]+)"
            loops, names = 1, re.findall(pattern, branches[1] if branches else attributes)
        elif opcode in ("fusion", "call", "async-start"):
            loops, names = 1, re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", attributes)
        else:
            continue
        for name in names:
            yield from _runs(computations, name, times * loops, fused or opcode == "fusion")


def _trips(condition: list[_Instruction]) -> int:
    """How often a loop runs that counts from 0 to a constant; 1 for any other."""
    values = {
        instruction.name: int(instruction.attributes.partition(")")[0])
        for instruction in condition
        if instruction.opcode == "constant" and re.match(r"\d+\)", instruction.attributes)
    }
    for instruction in condition:
        if instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
            return values.get("".join(instruction.operands[1:2]), 1)
    return 1


def _size(shape: str) -> float:
    """Bytes of a shape, or of all in a tuple, in device memory."""
    total = 0.0
    for kind, dimensions, layout in _SHAPE.findall(shape):
        if "S(" in layout:  # another memory space: on the chip
            continue
        bits = int(re.sub(r"\D", "", kind) or 0)
        each = _BYTES.get(kind, bits / 8)
        total += each * math.prod(int(size) for size in dimensions.split(",") if size)
    return total


# ---- Collectives -------------------------------------------------------------------------------


def _collective(instruction, kind, body, times, devices) -> Collective:
    operand = sum(
        # Where it is does not matter here, only how large.
        _size(re.sub(r"S\(\d+\)", "", body[name].shape))
        for name in instruction.operands
        if name in body
    )
    group = _group(instruction.attributes, devices)
    others = len(group) - 1
    share = {"all-gather": others, "all-reduce": 2 * others / len(group)}
    whole = kind in ("collective-permute", "collective-broadcast")
    factor = 1.0 if whole else share.get(kind, others / len(group))
    return Collective(kind, times, operand * factor, group)


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first of the groups of devices that an operation works in."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(int(device) for device in listed[1].split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, order, permutation = (
            tuple(map(int, part.split(","))) if part else None for part in iota.groups()
        )
        places = np.arange(math.prod(order)).reshape(order)
        return tuple(places.transpose(permutation).reshape(shape)[0].tolist())
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*)\{([^}]*)\}", attributes)
    if mesh:
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        chosen = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        places = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        if not any(part for _, part in chosen):
            names = [name for name, _ in chosen]
            index = tuple(slice(None) if name in names else 0 for name in axes)
            return tuple(places[index].ravel().tolist())
        return tuple(range(math.prod(int(part) if part else axes[name] for name, part in chosen)))
    return tuple(range(devices))


# ---- Memory ------------------------------------------------------------------------------------


def _accessed(instruction, body, computations) -> float:
    opcode, shape = instruction.opcode, instruction.shape
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    operands = [_size(body[name].shape) for name in instruction.operands if name in body]
    if opcode == "fusion":
        inner = computations[re.search(r"calls=%([\w.\-]+)", instruction.attributes)[1]]
        return _fusion_reads(inner, operands) + _fusion_writes(inner, shape)
    if opcode in _SLICES:
        return 2 * _size(shape)
    if opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if opcode.endswith("-start"):
        return 2 * sum(operands)
    return sum(operands) + _size(shape)


def _fusion_reads(inner, operands: list[float]) -> float:
    total = 0.0
    for instruction in inner:
        if instruction.opcode != "parameter":
            continue
        whole = operands[int(re.match(r"\d+", _parameter(instruction))[0])]
        reads = 0.0
        for user, place in _users(inner, instruction.name):
            if user.opcode in _SLICES and place == 0:
                reads += _size(user.shape)
            elif user.opcode != "dynamic-update-slice" or place != 0:
                reads = whole
                break
        total += min(reads, whole)
    return total


def _parameter(instruction) -> str:
    return instruction.operands[0] if instruction.operands else instruction.attributes


def _users(inner, name: str) -> list[tuple[_Instruction, int]]:
    """Who uses a value, seeing through bitcasts, and as which operand."""
    found = []
    for instruction in inner:
        if name in instruction.operands:
            if instruction.opcode == "bitcast":
                found += _users(inner, instruction.name)
            else:
                found.append((instruction, instruction.operands.index(name)))
    return found


def _fusion_writes(inner, shape: str) -> float:
    """An update in place writes the update, not the whole."""
    by_name = {instruction.name: instruction for instruction in inner}
    total = _size(shape)
    for instruction in inner:
        if instruction.opcode == "dynamic-update-slice":
            whole = _size(instruction.shape)
            if whole <= total:
                total += _size(by_name[instruction.operands[1]].shape) - whole
    return max(total, 0.0)
