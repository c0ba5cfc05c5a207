"""Convolutions over time, in the form that is fastest where they run, and their geometry.

On CPU, strided, grouped and depthwise convolutions are written as matrix products and sums of
shifted products: XLA's own, and above all their gradients, are several times slower there (figures
beside each). GPUs have some forms of their own, and elsewhere they are XLA's. The forms are tested
against each other.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from speech_jax.ops import masking, partition

_TIME = ("NWC", "WIO", "NWC")  # [B, T, C], [kernel, C in, C out]


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """How many samples one frame sees, after convolutions in turn without padding."""
    field = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        field = (field - 1) * stride + kernel
    return field


def output_length(
    lengths: int | np.ndarray | jax.Array, kernel: int, stride: int
) -> int | np.ndarray | jax.Array:
    """Frames after a convolution without padding: the whole windows that fit."""
    frames = (lengths - kernel) // stride + 1
    if isinstance(lengths, int) or jax.export.is_symbolic_dim(lengths):
        return jax.core.max_dim(frames, 0)
    return (np if isinstance(lengths, np.ndarray) else jnp).maximum(frames, 0)


# ---- Strided -----------------------------------------------------------------------------------


def strided(x: jax.Array, weight: jax.Array, stride: int) -> jax.Array:
    """[B, T, C] convolved with weight [K, C, D], no padding: [B, T', D]."""

    def product(x, weight):  # its gradients are about twice as fast on CPU as those of lax.conv
        kernel, channels, width = weight.shape
        seen = windows(x, kernel, stride)
        return _product(seen, weight.reshape(kernel * channels, width))

    def convolution(x, weight):
        return lax.conv_general_dilated(x, weight, (stride,), "VALID", dimension_numbers=_TIME)

    return partition.by_platform(convolution, cpu=product)(x, weight)


# [B, T, N] times [N, D]. JAX computes the weight's gradient transposed, so XLA first transposes the
# output's gradient, the largest array: a tenth of a step of wav2vec2 Base.
@jax.custom_vjp
def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(x, weight)


def _product_forward(x: jax.Array, weight: jax.Array) -> tuple:
    return jnp.matmul(x, weight), (x, weight)


def _product_backward(residuals: tuple, gradient: jax.Array) -> tuple:
    x, weight = residuals
    return jnp.matmul(gradient, weight.T), jnp.einsum("btn,btd->nd", x, gradient)


_product.defvjp(_product_forward, _product_backward)


def strided_and_normalized(
    x: jax.Array,
    frames: jax.Array,
    weight: jax.Array,
    stride: int,
    scale: jax.Array,
    shift: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    """`strided` and a group norm with a group for each channel, over the first `frames` of a row.

    The mean and variance over time of a convolution's output follow from the mean and covariance of
    its windows [B, F, K], so the output [B, F, D], the largest array of the encoder, is written
    once, normalized. A bias of the convolution would cancel.

    Args:
      x: [B, T, C]; frames: int [B]; weight: float32 [K, C, D]; scale, shift: float32 [D].
      dtype: what the product runs in; statistics are float32.
    """
    kernel, channels, width = weight.shape
    seen = windows(x, kernel, stride)  # [B, F, K C]
    weight = weight.reshape(kernel * channels, width)
    weight, bias = normalize_over_time(seen, frames, weight, scale, shift)
    return jnp.matmul(seen.astype(dtype), weight.astype(dtype)) + bias.astype(dtype)[:, None]


def over_time(
    x: jax.Array,
    weight: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **settings,
) -> jax.Array:
    """[B, T, C] padded and convolved with weight [K, C, D], strided: [B, T', D].

    As `over_plane`, it is for nn.Conv.
    """
    del settings
    return strided(jnp.pad(x, ((0, 0), *padding, (0, 0))), weight, *strides)


def windows(x: jax.Array, kernel: int, stride: int) -> jax.Array:
    """[B, T, C] to the windows of a strided convolution [B, T', kernel * C].

    By slices and a reshape, without a gather.
    """
    batch, length, channels = x.shape
    frames = output_length(length, kernel, stride)
    pieces = -(-kernel // stride)
    needed = (frames + pieces - 1) * stride
    x = at_length(x, needed).reshape(batch, frames + pieces - 1, stride * channels)
    widths = [min(stride, kernel - piece * stride) * channels for piece in range(pieces)]
    parts = [
        lax.slice(x, (0, piece, 0), (batch, piece + frames, width))
        for piece, width in enumerate(widths)
    ]
    return jnp.concatenate(parts, axis=-1)


def at_length(x: jax.Array, length: int) -> jax.Array:
    """[B, T, ...] cut to `length`, or padded with zeros."""
    missing = jax.core.max_dim(length - x.shape[1], 0)  # as an int, or in symbols of an export
    x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
    return lax.slice_in_dim(x, 0, length, axis=1)


def normalize_over_time(
    seen: jax.Array,
    frames: jax.Array,
    weight: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Folds the norm over time of `seen @ weight` into the weight [B, K, D] and a bias [B, D].

    Args:
      seen: [B, F, K]; frames: int [B], the valid ones; weight: [K, D]; scale, shift: [D].
    """
    valid = masking.length_mask(frames, seen.shape[1])[:, :, None]
    seen = seen.astype(jnp.float32)
    count = jnp.maximum(frames, 1).astype(jnp.float32)[:, None]
    mean = jnp.where(valid, seen, 0.0).sum(axis=1) / count  # [B, K]
    centered = jnp.where(valid, seen - mean[:, None], 0.0)
    exactly = {"precision": lax.Precision.HIGHEST}
    covariance = jnp.einsum("btk,btl->bkl", centered, centered, **exactly) / count[:, :, None]
    half = jnp.einsum("bkl,lc->bkc", covariance, weight, **exactly)
    variance = jnp.maximum((half * weight[None]).sum(axis=1), 0.0)  # [B, D]
    factor = scale[None] * lax.rsqrt(variance + 1e-5)
    bias = shift[None] - jnp.einsum("bk,kc->bc", mean, weight, **exactly) * factor
    return weight[None] * factor[:, None], bias


# ---- Over time and frequency -------------------------------------------------------------------


def over_plane(
    x: jax.Array,
    weight: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **settings,
) -> jax.Array:
    """[B, F, M, C] convolved with weight [K, L, C, D]: [B, F', M', D].

    It takes the place of lax.conv_general_dilated in nn.Conv; `settings` are those that nn.Conv
    gives it for a convolution without dilation and groups.
    """

    def convolution(x, weight):
        return lax.conv_general_dilated(x, weight, strides, padding, **settings)

    # cuDNN has no tensor cores for some strided shapes in bfloat16: 680 of the 800 ms of a step.
    def product(x, weight):
        height, length, channels, width = weight.shape
        seen = plane_windows(x, (height, length), strides, padding)
        weight = weight.reshape(height * length * channels, width)
        weight = jnp.pad(weight, ((0, seen.shape[-1] - len(weight)), (0, 0)))
        return jnp.matmul(seen, weight)

    return partition.by_platform(convolution, gpu=product)(x, weight)


def depthwise_over_plane(
    x: jax.Array,
    weight: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **settings,
) -> jax.Array:
    """Each of C channels of [B, F, M, C] convolved on its own with weight [K, L, 1, C].

    As `over_plane`, it is for nn.Conv: [B, F', M', C].
    """

    def convolution(x, weight):
        return lax.conv_general_dilated(x, weight, strides, padding, **settings)

    def products(x, weight):  # twice as fast on CPU, with its gradients
        kernel = weight.shape[:2]
        taps = _taps(jnp.pad(x, ((0, 0), *padding, (0, 0))), kernel, strides)
        each = weight.reshape(-1, 1, 1, 1, weight.shape[-1])
        return sum(tap * each[i] for i, tap in enumerate(taps))

    return partition.by_platform(convolution, cpu=products)(x, weight)


def plane_windows(
    x: jax.Array, kernel: Sequence[int], strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """[B, F, M, C] to the windows of a convolution [B, F', M', K L C].

    They end in zeros, up to a multiple of 16: matrix products are slow on other widths.
    """
    channels = x.shape[-1]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    taps = _taps(x, kernel, strides)
    missing = -len(taps) * channels % 16
    if missing:
        taps.append(jnp.zeros((*taps[0].shape[:3], missing), x.dtype))
    return jnp.concatenate(taps, axis=-1)


def _taps(x: jax.Array, kernel: Sequence[int], strides: Sequence[int]) -> list[jax.Array]:
    """What each of K L taps sees of [B, F, M, C], [B, F', M', C] each."""
    counts = [
        output_length(size, k, stride)
        for size, k, stride in zip(x.shape[1:3], kernel, strides, strict=True)
    ]
    ends = [(count - 1) * stride + 1 for count, stride in zip(counts, strides, strict=True)]
    return [
        lax.slice(
            x, (0, i, j, 0), (x.shape[0], i + ends[0], j + ends[1], x.shape[3]), (1, *strides, 1)
        )
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]


# ---- Depthwise ---------------------------------------------------------------------------------


def depthwise(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, past: int | None = None
) -> jax.Array:
    """Each of D channels of [B, T, D] convolved on its own with weight [K, D], to [B, T, D].

    A frame sees `past` frames before it and K - 1 - past after it; by default as many ('same').
    """
    kernel, width = weight.shape
    left = (kernel - 1) // 2 if past is None else past
    sides = (left, kernel - 1 - left)
    start = jnp.zeros((1, 1, width), x.dtype) if bias is None else bias[None, None]

    def convolution(x, weight, start):
        return start + lax.conv_general_dilated(
            x, weight[:, None], (1,), [sides], dimension_numbers=_TIME, feature_group_count=width
        )

    def products(x, weight, start):
        return start + _shifted_and_banded(x, weight, left)

    # On an H200, a step of Conformer-L in bfloat16 is 1.18 times as fast with it.
    forms = {"cpu": products} | ({"gpu": products} if x.dtype == jnp.bfloat16 else {})
    return partition.by_platform(convolution, **forms)(x, weight, start)


# A sum of shifted products in float32, which XLA fuses into one pass over the data: its own grouped
# convolution takes a fifth longer on CPU, and 2.8 times as long inside a scan over layers. The
# gradient of the weight is a product of matrices. Differentiated by JAX, each tap would keep its
# copy of x and read all of the gradient anew: 2.3 ms in place of 0.5 on two cores, forwards and
# back, of 4 x 125 frames of width 144 and 31 taps, and twice the time to compile.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted_and_banded(x: jax.Array, weight: jax.Array, left: int) -> jax.Array:
    kernel, frames = weight.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (left, kernel - 1 - left), (0, 0))).astype(jnp.float32)
    weight = weight.astype(jnp.float32)
    total = jnp.zeros(x.shape, jnp.float32)
    for tap in range(kernel):
        shifted = lax.slice_in_dim(padded, tap, tap + frames, axis=1)
        total = total + shifted * weight[tap][None, None]
    return total.astype(x.dtype)


def _banded_forward(x: jax.Array, weight: jax.Array, left: int) -> tuple:
    return _shifted_and_banded(x, weight, left), (x, weight)


def _banded_backward(left: int, residuals: tuple, gradient: jax.Array) -> tuple:
    x, weight = residuals
    kernel, width = weight.shape
    by_input = _shifted_and_banded(gradient, weight[::-1], kernel - 1 - left)
    if partition.is_split():  # devices would exchange the product, many times what they need
        padded = jnp.pad(x, ((0, 0), (left, kernel - 1 - left), (0, 0))).astype(jnp.float32)
        wide = gradient.astype(jnp.float32)
        taps = [
            (lax.slice_in_dim(padded, tap, tap + x.shape[1], axis=1) * wide).sum((0, 1))
            for tap in range(kernel)
        ]
        return by_input, jnp.stack(taps).astype(weight.dtype)
    # Blocks of `size` frames of the gradient [B, n, i, D], times those frames of x that they and
    # their taps saw [B, n, j, D]: tap k is the sum of the diagonal j - i = k.
    batch, frames, _ = x.shape
    size = max(-(-(kernel - 1) // 32) * 32, 32)
    count = -(-frames // size)
    seen = jnp.pad(x, ((0, 0), (left, (count + 1) * size - frames - left), (0, 0)))
    seen = seen.reshape(batch, count + 1, size, width)
    seen = jnp.concatenate([seen[:, :-1], seen[:, 1:]], axis=2)
    blocks = at_length(gradient, count * size).reshape(batch, count, size, width)
    product = jnp.einsum("bnjd,bnid->dij", seen, blocks, preferred_element_type=jnp.float32)
    product = jnp.pad(product.reshape(width, -1), ((0, 0), (0, size)))
    by_weight = product.reshape(width, size, 2 * size + 1).sum(axis=1)[:, :kernel].T
    return by_input, by_weight.astype(weight.dtype)


_shifted_and_banded.defvjp(_banded_forward, _banded_backward)


# ---- Dilated -----------------------------------------------------------------------------------


def dilated(x: jax.Array, weight: jax.Array, dilation: int) -> jax.Array:
    """[B, T, C] convolved with weight [K, C, D], its taps `dilation` frames apart, no padding.

    [B, T - (K - 1) dilation, D].
    """
    kernel, channels, width = weight.shape

    def convolution(x, weight):
        return lax.conv_general_dilated(
            x, weight, (1,), "VALID", rhs_dilation=(dilation,), dimension_numbers=_TIME
        )

    def product(x, weight):
        frames = x.shape[1] - (kernel - 1) * dilation
        taps = [
            lax.slice_in_dim(x, tap * dilation, tap * dilation + frames, axis=1)
            for tap in range(kernel)
        ]
        weight = weight.reshape(1, kernel * channels, width)
        return jnp.matmul(jnp.concatenate(taps, axis=-1), weight)

    return partition.by_platform(convolution, cpu=product)(x, weight)


# ---- Grouped -----------------------------------------------------------------------------------


def grouped(x: jax.Array, weight: jax.Array, groups: int) -> jax.Array:
    """[B, T, D] convolved over time with weight [K, D / groups, D], 'same' padding."""
    return partition.by_platform(
        lambda x, weight: _grouped(x, weight, groups),
        cpu=lambda x, weight: _grouped_on_cpu(x, weight, groups),
    )(x, weight)


def _grouped(x: jax.Array, weight: jax.Array, groups: int) -> jax.Array:
    kernel = weight.shape[0]
    return lax.conv_general_dilated(
        x,
        weight,
        window_strides=(1,),
        padding=[(kernel // 2, (kernel - 1) // 2)],
        dimension_numbers=_TIME,
        feature_group_count=groups,
    )


# XLA's gradient of the weight is some ten times slower on CPU than a matrix product.
_grouped_on_cpu = jax.custom_vjp(_grouped, nondiff_argnums=(2,))


def _grouped_forward(x: jax.Array, weight: jax.Array, groups: int) -> tuple:
    return _grouped(x, weight, groups), (x, weight)


def _grouped_backward(groups: int, residuals: tuple, gradient: jax.Array) -> tuple:
    x, weight = residuals
    _, input_vjp = jax.vjp(lambda x: _grouped(x, weight, groups), x)
    return *input_vjp(gradient), _weight_gradient(x, gradient, weight.shape, groups)


_grouped_on_cpu.defvjp(_grouped_forward, _grouped_backward)


def _weight_gradient(
    x: jax.Array, gradient: jax.Array, shape: tuple[int, int, int], groups: int
) -> jax.Array:
    # Tap k = a + block * b of the gradient is sum over s of x[s + a] * gradient[s - block * b]:
    # one product of `block` shifted copies of x and kernel / block shifted copies of gradient.
    kernel, width, _ = shape
    batch, frames, _ = x.shape
    block = math.gcd(kernel, 16)
    rest = kernel - block
    x = jnp.pad(x, ((0, 0), (kernel // 2, (kernel - 1) // 2), (0, 0)))
    gradient = jnp.pad(gradient, ((0, 0), (rest, rest), (0, 0)))

    def shifted(array, offsets):
        array = array.reshape(batch, -1, groups, width).transpose(2, 0, 1, 3)
        copies = [array[:, :, offset : offset + frames + rest] for offset in offsets]
        copies = jnp.concatenate(copies, axis=-1)  # [groups, B, T + rest, offsets * width]
        return copies.reshape(groups, batch * (frames + rest), len(offsets) * width)

    inputs = shifted(x, range(block))
    outputs = shifted(gradient, range(rest, -1, -block))
    product = jnp.einsum("gsi,gso->gio", inputs, outputs)
    product = product.reshape(groups, block, width, kernel // block, width)
    return product.transpose(3, 1, 2, 0, 4).reshape(shape)
