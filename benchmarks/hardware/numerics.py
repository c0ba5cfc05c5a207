"""Losses and gradients of the models against float32 on the CPU, with the same parameters.

`--only reference` computes those of the CPU and stores them in --work (it needs no device, so it
can run beside anything); without it they are compared with the device's: in float32 with whole
products ('highest'), in float32 as JAX multiplies by default, and in bfloat16. The figures are
norms of differences over norms; a gradient's is over all parameters together, `leaf` the worst of
one parameter (whose gradient is not next to nothing).
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.hardware import Table, forms, left, run_part
from benchmarks.hardware.build import config_of, make_batch, make_bucket, make_task
from speech_jax.ops import features
from speech_jax.training import sharding

MODELS = ("conformer-tiny", "wav2vec2-tiny")
VOCABULARY = 29
WAIT = 60.0  # seconds for the reference


def run(table: Table, flags: argparse.Namespace) -> None:
    """Stores the reference, or compares with it."""
    forms.choose(flags.forms)
    if flags.only == "reference":
        for name in MODELS:
            np.savez(flags.work / f"{name}.part.npz", *evaluate(name, "float32", "highest"))
            (flags.work / f"{name}.part.npz").rename(flags.work / f"{name}.npz")
        return
    for name in MODELS:
        file = flags.work / f"{name}.npz"
        end = time.monotonic() + WAIT
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.5)
        with np.load(file) as stored:
            wanted = [stored[key] for key in stored.files]
        for dtype, precision in (
            ("float32", "highest"), ("float32", "default"), ("bfloat16", "default"),
        ):  # fmt: skip
            if left(flags) < 5:
                return
            what = f"{name}, {dtype}, precision {precision}"
            with table.attempt(what):
                _compare(table, what, evaluate(name, dtype, precision), wanted)


def evaluate(name: str, dtype: str, precision: str) -> list[np.ndarray]:
    """What the front end hears, the loss in nats a label, and the gradient's leaves."""
    config = config_of(name, tiny=True, dtype=dtype, dropout=0.0)
    if "input_dropout" in config.model:
        config.model.input_dropout = 0.0
    task, fields = make_task(config, VOCABULARY)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    batch = make_batch(fields, make_bucket(4, 3.0, 24), mesh, VOCABULARY)
    batch["audio_length"] = np.asarray([48_000, 40_000, 33_333, 20_000], np.int32)
    batch["audio"] *= np.arange(48_000) < batch["audio_length"][:, None]
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), batch))
    params, state = shapes
    params = _fill(params)
    assert not jax.tree.leaves(state)

    def heard(batch):
        samples = features.to_waveform(batch["audio"])
        return features.log_mel(samples, batch["audio_length"], sample_rate=16_000)[0]

    def loss(params, batch):
        total, weight, _ = task.loss(params, {}, batch)
        return total / weight

    with jax.default_matmul_precision(precision):
        mels = jax.jit(heard)(batch)
        value, gradient = jax.jit(jax.value_and_grad(loss))(params, batch)
    return [np.asarray(x, np.float32) for x in (mels, value, *jax.tree.leaves(gradient))]


def _fill(shapes):
    """Parameters that are the same everywhere, none of them zero."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        fan_in = np.prod(x.shape[:-1]) if len(x.shape) > 1 else 100
        value = rng.standard_normal(x.shape) / np.sqrt(max(fan_in, 1))
        if "scale" in name or "magnitude" in name:
            value = 1 + 0.1 * value
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _compare(table: Table, what: str, found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    over = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
    flat = lambda leaves: np.concatenate([x.ravel() for x in leaves])
    size = np.linalg.norm(flat(wanted[2:])) / len(wanted[2:])
    leaves = [
        over(a, b)
        for a, b in zip(found[2:], wanted[2:], strict=True)
        if np.linalg.norm(b) > 1e-3 * size
    ]
    table.add(
        what,
        log_mel=over(found[0], wanted[0]),
        loss=over(found[1], wanted[1]),
        gradient=over(flat(found[2:]), flat(wanted[2:])),
        leaf=max(leaves),
        nats=float(wanted[1]),
    )


if __name__ == "__main__":
    run_part("numerics", run)
