"""Other ways to compute what the models do, to be tried side by side on an accelerator.

A name such as `conformer-l+banded+fused` is a model and its forms. What wins moves into speech_jax.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from speech_jax.ops import convolution, ctc


def choose(name: str) -> dict[str, object]:
    """Has this process compute by the forms of a name; returns what they change in config.model.

    The name before the first + is not looked at. A form is one of FORMS, of SETTINGS or an
    implementation of ops/ctc.py.
    """
    changes: dict[str, object] = {}
    for form in name.split("+")[1:]:
        if form in ctc.IMPLEMENTATIONS:
            ctc.ctc_loss = functools.partial(ctc.ctc_loss, implementation=form)
        elif form in FORMS or form in SETTINGS:
            FORMS.get(form, lambda: None)()
            changes |= SETTINGS.get(form, {})
        else:
            raise ValueError(f"no form {form!r}")
    return changes


def apply(name: str, config: ConfigDict) -> ConfigDict:
    """`choose`, and the configuration with what it changes."""
    with config.unlocked():
        config.model.update(choose(name))
    return config


# ---- Depthwise convolutions: each stands for ops.convolution.depthwise ---------------------------


def shifted(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """A sum of shifted products, differentiated by JAX."""
    return _plus(_shifted(x, weight), bias)


def banded(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Products of blocks of frames with a banded matrix for each channel, on the tensor cores."""
    kernel, width = weight.shape
    size = _block(kernel)
    # Entry (i, j) of the band is tap j - i: a row is the one before it, moved by one.
    taps = jnp.pad(weight, ((0, 2 * size + 1 - kernel), (0, 0)))
    band = jnp.broadcast_to(taps, (size, *taps.shape)).reshape(-1, width)[: 2 * size * size]
    band = band.reshape(size, 2 * size, width)
    out = jnp.einsum("bnjd,ijd->bnid", _overlapping(x, kernel), band)
    return _plus(out.reshape(x.shape[0], -1, width)[:, : x.shape[1]], bias)


def grouped(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """XLA's own."""
    out = jax.lax.conv_general_dilated(
        x,
        weight[:, None],
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=weight.shape[1],
    )
    return _plus(out, bias)


def _plus(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + bias[None, None]


def _shifted(x: jax.Array, weight: jax.Array) -> jax.Array:
    kernel, frames = weight.shape[0], x.shape[1]
    left = (kernel - 1) // 2
    padded = jnp.pad(x, ((0, 0), (left, kernel - 1 - left), (0, 0)))
    total = jnp.zeros((), jnp.float32)
    for tap in range(kernel):
        product = padded[:, tap : tap + frames].astype(jnp.float32)
        total = total + product * weight[tap][None, None].astype(jnp.float32)
    return total.astype(x.dtype)


def _block(kernel: int) -> int:
    return max(-(-(kernel - 1) // 32) * 32, 32)


def _overlapping(x: jax.Array, kernel: int) -> jax.Array:
    """[B, T, D] to blocks of frames with those that follow, as a convolution sees them."""
    size, left = _block(kernel), (kernel - 1) // 2
    batch, frames, width = x.shape
    count = -(-frames // size)
    x = jnp.pad(x, ((0, 0), (left, (count + 1) * size - frames - left), (0, 0)))
    x = x.reshape(batch, count + 1, size, width)
    return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)  # [B, n, 2 size, D]


# ---- Other convolutions --------------------------------------------------------------------------


def strided(x: jax.Array, weight: jax.Array, stride: int) -> jax.Array:
    """ops.convolution.strided as a product of windows."""
    kernel, channels, width = weight.shape
    seen = convolution.windows(x, kernel, stride)
    return jnp.matmul(seen, weight.reshape(kernel * channels, width))


# ---- Layers --------------------------------------------------------------------------------------


def _saved(primitive, *_, **parameters) -> bool:
    """Products with the parameters and what attention in one kernel made are worth their memory."""
    if "dot_product_attention" in primitive.name:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *_, **parameters)


def _keep_products() -> None:
    usual = nn.remat
    nn.remat = lambda module, **settings: usual(module, policy=_saved, **settings)


def _set(module, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(module, name, value)


FORMS: dict[str, Callable[[], None]] = {
    "shifted": _set(convolution, "depthwise", shifted),
    "banded": _set(convolution, "depthwise", banded),
    "windows": _set(convolution, "strided", strided),
    "lax": _set(convolution, "over_plane", jax.lax.conv_general_dilated),
    "grouped": _set(convolution, "depthwise", grouped),
    "products": _keep_products,
    "rolled": _set(ctc, "UNROLL", 1),
    "rolled4": _set(ctc, "UNROLL", 4),
}
SETTINGS: dict[str, dict[str, object]] = {
    "products": {"remat": True},
    "fused": {"attention_dropout": 0.0},
    "dry": {"dropout": 0.0, "attention_dropout": 0.0},
    "unrolled": {"scan": False},
    "narrow": {"subsampling_channels": 128},
}
