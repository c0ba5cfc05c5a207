"""Where a compiled program's time goes on its device: a trace, read on the spot.

The kernels of the trace are named by their HLO instruction; the program's text says which line of
which module an instruction stands for.
"""

import collections
import contextlib
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax

# What is no work of its own on a CPU: what calls the other instructions.
_CALLERS = ("while", "call", "conditional")


class Kernel(NamedTuple):
    """An instruction of a program."""

    name: str
    function: str  # what ran on the device
    place: str  # op_name of its metadata
    milliseconds: float  # a call of the program
    share: float  # of the time of all instructions
    count: float  # how often it runs in a call


class Profile(NamedTuple):
    """A program's time by instruction, and by module of the model; the most expensive first."""

    milliseconds: float  # all instructions of a call
    kernels: list[Kernel]
    modules: dict[str, float]  # milliseconds


def profile(
    call: Callable[[], object], calls: int, text: str, folder: pathlib.Path | None = None
) -> Profile:
    """Traces so many calls (each blocks) of a program whose compiled text is given.

    The trace is left in `folder`, where one is given.
    """
    with contextlib.ExitStack() as stack:
        folder = folder or stack.enter_context(tempfile.TemporaryDirectory())
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = options.host_tracer_level = 0
        if jax.default_backend() == "cpu":
            options.host_tracer_level = 2  # there the kernels are on the host
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(calls):
                call()
        file = max(pathlib.Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        with warnings.catch_warnings():
            # Of the reader's own types; as an error it would end the process.
            warnings.simplefilter("ignore", DeprecationWarning)
            seconds, counts, functions = _durations(jax.profiler.ProfileData.from_file(str(file)))
    places = _places(text)
    total = sum(seconds.values())
    kernels = [
        Kernel(
            name,
            functions[name],
            places.get(name, ""),
            1e3 * took / calls,
            took / total,
            counts[name] / calls,
        )
        for name, took in seconds.most_common()
    ]
    modules: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        modules[module_of(kernel.place) or kernel.name] += kernel.milliseconds
    return Profile(1e3 * total / calls, kernels, dict(modules.most_common()))


def _durations(data) -> tuple[collections.Counter, collections.Counter, dict[str, str]]:
    """Seconds and runs of each instruction, and the function of the device that it was."""
    functions: dict[str, str] = {}
    seconds: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    on_device = any(plane.name.startswith("/device:") for plane in data.planes)
    for plane in data.planes:
        if on_device and not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if line.name.startswith(("XLA ", "Framework", "Steps", "Source")):
                continue  # sums of what other lines show one by one
            for event in line.events:
                stats = {key: value for key, value in event.stats if key}
                name = stats.get("hlo_op") or (event.name if on_device else "")
                if not name or str(name).startswith(_CALLERS):
                    continue
                if str(name).startswith("command_buffer"):
                    name = event.name  # all kernels of a graph have its name
                functions.setdefault(str(name), event.name)
                seconds[str(name)] += event.duration_ns / 1e9
                counts[str(name)] += 1
    return seconds, counts, functions


def _places(text: str) -> dict[str, str]:
    """op_name of every instruction of a program; of a fusion without one, that of its last part."""
    places: dict[str, str] = {}
    inside: dict[str, str] = {}  # computation -> an op_name in it
    missing: dict[str, str] = {}  # instruction -> the computation that it calls
    computation = ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line):
            computation = head[1]
        if not (found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)):
            continue
        if op := re.search(r'op_name="([^"]+)"', line):
            places[found[1]] = op[1]
            if "custom-call" in line or computation not in inside:
                inside[computation] = op[1]
        elif called := re.search(r"calls=%?([\w.\-]+)", line):
            missing[found[1]] = called[1]
    places |= {name: inside.get(called, "") for name, called in missing.items()}
    # Kernels in a graph go by their functions, whose names have no points.
    return {re.sub(r"[.\-]", "_", name): place for name, place in places.items()} | places


# Parts of an op_name that say how a part of a model is run.
_AROUND = ("while", "body", "encoder", "eval_jaxpr", "checkpoint", "rematted_computation")


def module_of(place: str) -> str:
    """The part of a model that an op_name belongs to: 'backward, layers/attention'."""
    if not place:
        return ""
    if "dynamic_update_index_in_dim" in place or "dynamic_index_in_dim" in place:
        return "kept for the gradient, by the loop over layers"
    direction = "backward" if "transpose(" in place else "forward"
    if direction == "backward" and "rematted" in place:
        direction = "recomputed"
    parts = [part for part in place.split("/") if re.fullmatch(r"[a-z_]+(_\d+)?", part)]
    parts = [part for part in parts if part not in _AROUND]
    known = ("layers", "layer", "subsampling", "extractor", "position", "head")
    start = next((i for i, part in enumerate(parts) if part.startswith(known)), None)
    if start is None:
        if "CTCModel" in place:
            return f"{direction}, encoder"
        return "loops outside of the encoder" if "while" in place else "outside of the encoder"
    return f"{direction}, {'/'.join(parts[start : start + 2])}"
