"""Compiles the training step for a slice or for GPUs that are not here, and reads what came out.

No data and no accelerator is needed: the batch is the longest bucket that the configuration allows,
full. The step time is a roofline: arithmetic, memory traffic and collectives each at the rate on
the chip's data sheet (costs.CHIPS), the slowest of the three if they overlap entirely. A real step
takes longer; what the roofline says is whether a plan can be good, and what limits it.
"""

import math
import os
import re
from collections import Counter
from typing import NamedTuple

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from speech_jax import experiment
from speech_jax.errors import UserError
from speech_jax.preflight import assumed, hlo
from speech_jax.setup import make_setup
from speech_jax.training import costs, sharding


class Slice(NamedTuple):
    """Devices to compile for."""

    name: str
    devices: list
    hosts: int  # among which the devices are divided evenly; 1 where there is one interconnect


def run(config: ConfigDict, topology: str = "") -> dict:
    """Prints what the configured step needs and does on `topology`; returns `measure`'s figures.

    Raises:
      UserError: it does not fit, or there is no such topology.
    """
    figures = measure(config, find_devices(topology))
    show(figures)
    if not figures["fits"]:
        raise UserError(f"it does not fit {figures['topology']}: {figures['why']}")
    return figures


# ---- Devices -----------------------------------------------------------------------------------


def find_devices(topology: str) -> Slice:
    """'v5e:4x4', 'h200:8', 'h200:4x8' (4 hosts of 8) or '' for the local devices.

    Raises:
      UserError: for a name that is not understood, or whose compiler is not installed.
    """
    if not topology:
        return Slice("this machine", jax.devices(), 1)
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not match:
        raise UserError(
            f"--topology={topology!r} is not KIND:SHAPE, such as v5e:4x4, v5p:4x4x4 or h200:8"
        )
    kind, shape = match.groups()
    sizes = [int(size) for size in shape.split("x")]
    jax.config.update("jax_platforms", "cpu")  # the devices are not here
    if kind in costs.GPUS and len(sizes) <= 2:
        hosts, each = sizes if len(sizes) == 2 else (1, *sizes)
        # Autotuning would run on the device, and Triton's products want it: cuBLAS does without.
        wanted = " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + wanted
        target = costs.gpu_target(kind)
        arguments = {"topology": f"1x{hosts}x{each}", "target_config": target}
        return Slice(topology, _describe(topology, "cuda", "", "gpu", **arguments), hosts)
    if kind in ("v4", "v5e", "v5p", "v6e"):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks a cloud for its machine
        # One chip is a host of its own; in larger slices, each host has the usual 2 x 2.
        arguments = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(sizes) == 1 else {}
        return Slice(topology, _describe(topology, "tpu", topology, "tpu-aot", **arguments), 1)
    raise UserError(
        f"--topology={topology!r} is not known: v4, v5e, v5p or v6e with a shape such as 4x4, or "
        f"{', '.join(costs.GPUS)} with N devices or HOSTSxN"
    )


def _describe(asked, platform, name, extra, **arguments) -> list:
    try:
        return list(
            topologies.get_topology_desc(platform=platform, topology_name=name, **arguments).devices
        )
    except Exception as error:  # of many types, some of them for a missing plugin
        raise UserError(
            f"cannot compile for --topology={asked}: {' '.join(str(error).split())[:200]} "
            f"(does it exist, and is its compiler installed? pip install 'speech_jax[{extra}]')"
        ) from error


# ---- Figures -----------------------------------------------------------------------------------


def measure(config: ConfigDict, where: Slice) -> dict:
    """Compiles the configured step for `where`; returns what it needs and does, for each device.

    Keys: 'topology', 'device', 'devices', 'mesh', 'rows', 'seconds' (of a row), 'fits', 'why';
    bytes 'parameters', 'optimizer' (and averaged parameters), 'temporary', 'total', 'memory'; of a
    step 'flops', 'memory_traffic' (bytes), 'collectives' {kind: {'count', 'bytes' sent}}, 'unread'
    (instructions of the program that were not understood, and are missing in these);
    and, where the chip's rates are known and it fits, seconds 'arithmetic_seconds',
    'memory_seconds', 'collective_seconds' and 'step_seconds', 'bound', 'mfu',
    'audio_hours_per_second' (of all devices together).
    """
    mesh = sharding.make_mesh(**config.mesh, devices=where.devices)
    parts = assumed.make_parts(config)
    task = experiment.make_task(config, parts)
    bucket = assumed.longest_bucket(config, task, parts, mesh)
    setup = make_setup(config, task, assumed.fields_of(parts), mesh, bucket)
    abstract = setup.abstract
    chip = costs.chip(where.devices[0].device_kind)
    count = len(where.devices)
    figures = {
        "topology": where.name,
        "device": where.devices[0].device_kind,
        "devices": count,
        "mesh": dict(mesh.shape),
        "rows": bucket.rows,
        "seconds": bucket.size("samples") / config.data.sample_rate,
        "parameters": _bytes(abstract.params),
        "optimizer": _bytes((abstract.opt_state, abstract.ema)),
        "memory": chip.memory if chip else None,
        "fits": True,
        "why": "",
    }
    with jax.set_mesh(mesh):
        traced = setup.step().trace(abstract, setup.batch(bucket))
        lowered = traced.lower()
    figures["flops"] = costs.matmul_flops(traced.jaxpr) / count
    try:
        # All that is asked for is memory, collectives and a schedule, not the fastest kernels: the
        # TPU compiler would take some twenty times as long.
        compiled = lowered.compile(compiler_options=_options(where))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return figures | {"fits": False, "why": " ".join(str(error).split())[:300]}
    total = costs.memory_needed(compiled)
    figures |= {"temporary": compiled.memory_analysis().temp_size_in_bytes, "total": total}
    if chip and total > chip.memory:
        figures |= {"fits": False, "why": f"{total / 2**30:.1f} of {chip.memory / 2**30:.1f} GiB"}
    moved = hlo.traffic(compiled.as_text(), count)
    kinds, sent = Counter(), Counter()
    for one in moved.collectives:
        kinds[one.kind] += one.times
        sent[one.kind] += one.times * one.sent
    figures |= {
        "memory_traffic": moved.memory,
        "unread": moved.unread,
        "collectives": {kind: {"count": kinds[kind], "bytes": sent[kind]} for kind in kinds},
    }
    return figures | (_roofline(figures, moved, where, chip) if chip else {})


def _options(where: Slice) -> dict | None:
    tpu = where.devices[0].platform == "tpu"
    return {"exec_time_optimization_effort": -1.0} if tpu else None


def _bytes(tree) -> int:
    """Bytes of a tree of shapes on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _roofline(figures, moved, where, chip) -> dict:
    arithmetic = figures["flops"] / chip.flops
    memory = moved.memory / chip.bandwidth
    collectives = sum(
        one.times * one.sent / _rate(one.group, len(where.devices) // where.hosts, chip)
        for one in moved.collectives
    )
    times = {"arithmetic": arithmetic, "memory": memory, "collectives": collectives}
    step = max(times.values())
    audio = figures["rows"] * figures["seconds"] / 3600
    return {
        "arithmetic_seconds": arithmetic,
        "memory_seconds": memory,
        "collective_seconds": collectives,
        "step_seconds": step,
        "bound": max(times, key=times.get),
        "mfu": arithmetic / step,
        "audio_hours_per_second": audio / step,
    }


def _rate(group, each: int, chip) -> float:
    """Bytes/s that a device of the group sends: a ring leaves a host by all adapters in it."""
    if not chip.network or len({device // each for device in group}) == 1:
        return chip.link
    members = sum(device // each == group[0] // each for device in group)
    return min(chip.link, chip.network * members)


# ---- Table -------------------------------------------------------------------------------------


def show(figures: dict) -> None:
    """Prints figures as a table, with the rates that the estimate is made with."""
    chip = costs.chip(figures["device"])
    mesh = " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    title = f"{figures['topology']}: {figures['devices']} x {figures['device']}, mesh {mesh}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("batch", f"{figures['rows']} rows of {figures['seconds']:g} s")
    for name in ("parameters", "optimizer", "temporary", "total"):
        if name in figures:
            of = f" of {_gib(figures['memory'])}" if chip and name == "total" else ""
            table.add_row(f"{name} per chip", _gib(figures[name]) + of)
    verdict = "yes" if figures["fits"] else f"NO: {figures['why']}"
    table.add_row("fits", verdict if chip else "unknown: this device's memory is in no table")
    table.add_row("FLOPs per chip and step", f"{figures['flops'] / 1e12:.3f} T")
    if "memory_traffic" in figures:
        table.add_row("memory traffic", f"{figures['memory_traffic'] / 1e9:.2f} GB")
        for kind, moved in figures["collectives"].items():
            table.add_row(f"sent by {kind}", f"{moved['bytes'] / 1e6:.1f} MB in {moved['count']}")
        if not figures["collectives"]:
            table.add_row("collectives", "none")
        if figures["unread"]:
            table.add_row("not understood", f"{figures['unread']} instructions: more is moved")
    if "step_seconds" in figures:
        for name in ("arithmetic", "memory", "collective"):
            table.add_row(f"{name} time", f"{1e3 * figures[f'{name}_seconds']:.2f} ms")
        step = f"{1e3 * figures['step_seconds']:.2f} ms, bound by {figures['bound']}"
        table.add_row("roofline step", step)
        table.add_row("MFU at the roofline", f"{100 * figures['mfu']:.0f}%")
        table.add_row("audio", f"{figures['audio_hours_per_second']:.1f} h/s")
    if chip:
        network = f", {chip.network / 1e9:g} GB/s to other hosts" if chip.network else ""
        table.caption = (
            f"at {chip.flops / 1e12:g} TFLOP/s (bfloat16), {chip.bandwidth / 1e9:g} GB/s of "
            f"memory, {chip.link / 1e9:g} GB/s to other chips{network}: data sheets, see costs.py"
        )
    Console(highlight=False).print(table)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
