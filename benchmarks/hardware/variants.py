"""Ways to compute the same thing side by side, at the shapes of Conformer-L and wav2vec2 Base.

Forward and backward in bfloat16, medians. What is `ours` is what the models do today; the others
are what they could do. Errors are of outputs against `ours` in float32 with whole products.
"""

import argparse
import concurrent.futures
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.hardware import Table, alone, forms, left, median_seconds, run_part
from speech_jax.models import layers
from speech_jax.ops import convolution

OTHER = ("rotary", "dropout", "quarter", "separable", "hash", "random")  # not the same function


def run(table: Table, flags: argparse.Namespace) -> None:
    """Attention, depthwise convolution, subsampling, extractor, dropout, norm."""
    if flags.tiny:
        shapes = {"conformer-l": (2, 32, 2, 16), "wav2vec2-base": (2, 40, 2, 16)}
    else:
        shapes = {"conformer-l": (40, 400, 8, 64), "wav2vec2-base": (20, 800, 12, 64)}
    for name, shape in shapes.items():
        _compare(table, flags, f"attention, {name}", *attention(*shape))
    size = (2, 32, 16) if flags.tiny else (40, 400, 512)
    _compare(table, flags, "depthwise, conformer-l", *depthwise(*size))
    size = (2, 64, 20, 8) if flags.tiny else (20, 1600, 80, 512)
    _compare(table, flags, "subsampling, conformer-l", *subsampling(*size))
    size = (2, 4000, 16) if flags.tiny else (10, 256_000, 512)
    _compare(table, flags, "extractor, wav2vec2-base", *extractor(*size))
    size = (2, 40, 64, 16, 4) if flags.tiny else (20, 800, 768, 128, 16)
    _compare(table, flags, "positional convolution, wav2vec2-base", *positional(*size))
    size = (2, 32, 16) if flags.tiny else (40, 400, 2048)
    _compare(table, flags, "dropout of the feed-forward, conformer-l", *dropout(*size))
    size = (2, 32, 16) if flags.tiny else (40, 400, 512)
    _compare(table, flags, "layer norm, conformer-l", *norm(*size))


def _compare(
    table: Table,
    flags: argparse.Namespace,
    what: str,
    variants: dict[str, Callable],
    arrays: tuple[jax.Array, ...],
) -> None:
    whole = [x.astype(jnp.float32) for x in arrays]
    with jax.default_matmul_precision("highest"), table.attempt(f"{what}, in float32"):
        first = next(iter(variants.values()))
        wanted = np.asarray(jax.jit(first)(whole[0][:2], *whole[1:]))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = {name: pool.submit(_compile, f, arrays) for name, f in variants.items()}
    for name, program in programs.items():
        if left(flags) < 4:
            return
        with table.attempt(f"{what}: {name}"):
            forward, both = program.result()
            found = np.asarray(forward(*arrays)[:2], np.float32)
            with alone(flags.work):
                repeats = 2 if flags.tiny else 10
                times = [
                    median_seconds(lambda f=f: jax.block_until_ready(f(*arrays)), repeats)
                    for f in (forward, both)
                ]
            same = not any(word in name for word in OTHER)
            error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted) if same else None
            table.add(
                f"{what}: {name}",
                forward_ms=1e3 * times[0],
                both_ms=1e3 * times[1],
                temporary_MB=both.memory_analysis().temp_size_in_bytes / 1e6,
                error=error and float(error),
            )


def _compile(function: Callable, arrays: tuple[jax.Array, ...]) -> tuple[jax.stages.Compiled, ...]:
    def gradient(*arrays):
        def total(*arrays):
            out = function(*arrays).astype(jnp.float32)
            return (out * jnp.cos(out)).sum()

        return jax.grad(total, argnums=tuple(range(len(arrays))))(*arrays)

    return tuple(jax.jit(f).lower(*arrays).compile() for f in (function, gradient))


def _normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(jnp.bfloat16)


def attention(batch: int, frames: int, heads: int, width: int):
    """Query, key and value in one array [B, T, 3, H, D]; keys past a row's length are masked."""
    lengths = jnp.asarray(np.linspace(0.7, 1, batch) * frames, jnp.int32).at[:2].set(frames)
    seed = jnp.asarray([1, 2], jnp.uint32)

    def split(qkv):
        rows = qkv.shape[0]
        mask = jnp.arange(frames) < lengths[:rows, None]
        return (*(qkv[:, :, i] for i in range(3)), mask, lengths[:rows])

    def ours(qkv, rate=0.0, rotate=False, softmax_dtype=jnp.float32):
        query, key, value, mask, _ = split(qkv)
        if rotate:
            query, key = layers.rotate(query), layers.rotate(key)
        scores = jnp.einsum("bthd,bshd->bhts", query, key).astype(softmax_dtype)
        scores = scores / np.sqrt(width).astype(softmax_dtype)
        scores = jnp.where(mask[:, None, None, :], scores, jnp.asarray(-1e30, softmax_dtype))
        weights = jax.nn.softmax(scores, axis=-1).astype(qkv.dtype)
        weights = layers.dropout(weights, rate, seed if rate else None, 0)
        return jnp.einsum("bhts,bshd->bthd", weights, value)

    def library(implementation, lengths_only):
        def function(qkv):
            query, key, value, mask, lengths = split(qkv)
            limits = {"mask": jnp.broadcast_to(mask[:, None, None], (len(mask), 1, frames, frames))}
            if lengths_only:
                limits = {"query_seq_lengths": jnp.full_like(lengths, frames)}
                limits |= {"key_value_seq_lengths": lengths}
            return jax.nn.dot_product_attention(
                query, key, value, implementation=implementation, **limits
            )

        return function

    variants = {
        "ours (einsum, float32 scores)": ours,
        "ours, rotary": lambda x: ours(x, rotate=True),
        "ours, dropout": lambda x: ours(x, rate=0.1),
        "ours, bfloat16 scores": lambda x: ours(x, softmax_dtype=jnp.bfloat16),
        "jax.nn, xla": library("xla", False),
    }
    if jax.default_backend() == "gpu":
        variants["jax.nn, cudnn, lengths"] = library("cudnn", True)
        variants["jax.nn, cudnn, mask"] = library("cudnn", False)
    return variants, (_normal(0, batch, frames, 3, heads, width),)


def depthwise(batch: int, frames: int, width: int, kernel: int = 31):
    """[B, T, D] with [K, D]."""

    def ours(x, weight):
        return convolution.depthwise(x, weight, None)

    def channels_first(x, weight):
        out = lax.conv_general_dilated(
            x.transpose(0, 2, 1)[:, :, None],
            weight.T[:, None, None],
            (1, 1),
            "SAME",
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
            feature_group_count=width,
        )
        return out[:, :, 0].transpose(0, 2, 1)

    variants = {
        "ours": ours,
        "shifted products": lambda x, weight: forms.shifted(x, weight, None),
        "banded products": lambda x, weight: forms.banded(x, weight, None),
        "lax.conv, grouped": lambda x, weight: forms.grouped(x, weight, None),
        "lax.conv, grouped, channels first": channels_first,
    }
    return variants, (_normal(0, batch, frames, width), _normal(1, kernel, width, scale=0.2))


def subsampling(batch: int, frames: int, mels: int, width: int):
    """Log-mel [B, F, M, 1] through two 3x3 convolutions of stride 2, of D or of fewer channels."""

    def convolve(x, weight, layout="NHWC", groups=1):
        return lax.conv_general_dilated(
            x,
            weight,
            (2, 2),
            ((1, 1), (1, 1)),
            dimension_numbers=(layout, "HWIO", layout),
            feature_group_count=groups,
        )

    def through(channels):
        def function(x, first, second):
            x = jax.nn.relu(convolve(x, first[..., :channels]))
            return jax.nn.relu(convolve(x, second[:, :, :channels, :channels]))

        return function

    def channels_first(x, first, second):
        x = jax.nn.relu(convolve(x.transpose(0, 3, 1, 2), first, "NCHW"))
        return jax.nn.relu(convolve(x, second, "NCHW")).transpose(0, 2, 3, 1)

    def separable(x, first, second):
        x = jax.nn.relu(convolve(x, first))
        x = convolve(x, second[:, :, :1], groups=width)
        return jax.nn.relu(jnp.einsum("bfmc,cd->bfmd", x, second[1, 1]))

    variants = {
        "ours (channels last)": through(width),
        "channels first": channels_first,
        "a quarter of the channels": through(width // 4),
        "second depthwise-separable": separable,
    }
    return variants, (
        _normal(0, batch, frames, mels, 1),
        _normal(1, 3, 3, 1, width, scale=0.3),
        _normal(2, 3, 3, width, width, scale=0.015),
    )


def extractor(batch: int, samples: int, channels: int):
    """A waveform [B, T, 1] through wav2vec2's seven convolutions and GELU, without norms."""
    kernels, strides = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)

    def through(convolve):
        def function(x, *weights):
            for weight, stride in zip(weights, strides, strict=True):
                x = jax.nn.gelu(convolve(x, weight, stride), approximate=False)
            return x

        return function

    def product(x, weight, stride):
        seen = convolution.windows(x, weight.shape[0], stride)
        return jnp.matmul(seen, weight.reshape(-1, weight.shape[2]))

    def plain(x, weight, stride):
        return lax.conv_general_dilated(
            x, weight, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )

    def images(x, weight, stride):
        return lax.conv_general_dilated(
            x[:, None],
            weight[None],
            (1, stride),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[:, 0]

    widths = (1, *(channels,) * 6)
    weights = [
        _normal(i, kernel, width, channels, scale=(2 / kernel / width) ** 0.5)
        for i, (kernel, width) in enumerate(zip(kernels, widths, strict=True))
    ]
    variants = {
        "ours": through(convolution.strided),
        "windows and a product": through(product),
        "lax.conv": through(plain),
        "lax.conv, as images": through(images),
    }
    return variants, (_normal(9, batch, samples, 1), *weights)


def positional(batch: int, frames: int, width: int, kernel: int, groups: int):
    """wav2vec2's grouped convolution [B, T, D] with [K, D / groups, D]."""

    def plain(x, weight):
        return lax.conv_general_dilated(
            x,
            weight,
            (1,),
            [(kernel // 2, (kernel - 1) // 2)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )

    variants = {
        "ours": lambda x, w: convolution.grouped(x, w, groups),
        "lax.conv": plain,
        "the CPU's weight gradient": lambda x, w: convolution._grouped_on_cpu(x, w, groups),
    }
    scale = (kernel * width / groups) ** -0.5
    weight = _normal(1, kernel, width // groups, width, scale=scale)
    return variants, (_normal(0, batch, frames, width), weight)


def dropout(batch: int, frames: int, width: int):
    """Masks by our hash against JAX's generator and the device's."""

    def drawn(implementation):
        def function(x):
            key = jax.random.key(0, impl=implementation)
            keep = jax.random.bernoulli(key, 0.9, x.shape)
            return jnp.where(keep, x / jnp.asarray(0.9, x.dtype), jnp.zeros((), x.dtype))

        return function

    seed = jnp.asarray([1, 2], jnp.uint32)
    variants = {
        "none": lambda x: x * 1,
        "ours (a hash)": lambda x: layers.dropout(x, 0.1, seed, 0),
        "jax.random, threefry": drawn("threefry2x32"),
        "jax.random, rbg": drawn("rbg"),
    }
    return variants, (_normal(0, batch, frames, width),)


def norm(batch: int, frames: int, width: int):
    """Float32 statistics against bfloat16 ones."""

    def ours(x, scale):
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        variance = jnp.square(x32).mean(-1, keepdims=True) - jnp.square(mean)
        y = (x32 - mean) * lax.rsqrt(variance + 1e-5) * scale.astype(jnp.float32)
        return y.astype(x.dtype)

    def half(x, scale):
        mean = x.mean(-1, keepdims=True)
        centred = x - mean
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return centred * lax.rsqrt(variance + jnp.asarray(1e-5, x.dtype)) * scale

    variants = {"ours (float32)": ours, "bfloat16": half}
    return variants, (_normal(0, batch, frames, width), _normal(1, width))


if __name__ == "__main__":
    run_part("variant", run)
