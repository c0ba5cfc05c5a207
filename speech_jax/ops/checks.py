"""What a loss over label sequences may be given; whatever cannot work is named."""

import jax
import jax.numpy as jnp
import numpy as np


def checked(
    logits: jax.Array,
    logit_lengths: jax.Array,
    labels: jax.Array,
    label_lengths: jax.Array,
    blank_id: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The arrays, valid, with at least one column of labels and blanks for their padding.

    Raises:
      ValueError: as ops.ctc.ctc_loss says.
    """
    _check(logits, logit_lengths, labels, label_lengths, blank_id)
    labels = jnp.asarray(labels, jnp.int32)
    logit_lengths = jnp.asarray(logit_lengths, jnp.int32)
    label_lengths = jnp.asarray(label_lengths, jnp.int32)
    labels = jnp.pad(labels, ((0, 0), (0, labels.shape[1] == 0)))
    inside = jnp.arange(labels.shape[1])[None] < label_lengths[:, None]
    return jnp.asarray(logits), logit_lengths, jnp.where(inside, labels, blank_id), label_lengths


def _check(
    logits: jax.Array,
    logit_lengths: jax.Array,
    labels: jax.Array,
    label_lengths: jax.Array,
    blank_id: int,
) -> None:
    shape, rest = jnp.shape(logits), {"labels": (labels, 2)}
    if len(shape) != 3 or 0 in shape[1:]:
        raise ValueError(f"logits must be [B, T, K] with T and K at least 1, got shape {shape}")
    if not jnp.issubdtype(jnp.result_type(logits), jnp.floating):
        raise ValueError(f"logits of shape {shape} must be floating, got {jnp.result_type(logits)}")
    B, T, K = shape
    rest |= {"logit_lengths": (logit_lengths, 1), "label_lengths": (label_lengths, 1)}
    for name, (value, rank) in rest.items():
        if len(jnp.shape(value)) != rank or jnp.shape(value)[0] != B:
            wanted = f"[{B}, N]" if rank == 2 else f"[{B}]"
            raise ValueError(
                f"{name} must be {wanted} for logits of shape {shape}, got {jnp.shape(value)}"
            )
        if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
            raise ValueError(
                f"{name} of shape {jnp.shape(value)} must be integers, got {jnp.result_type(value)}"
            )
    if not 0 <= blank_id < K:
        raise ValueError(f"blank_id {blank_id} is not a class of logits of shape {shape}")
    N = jnp.shape(labels)[1]
    for name, value, limit in (
        ("logit_lengths", logit_lengths, T),
        ("label_lengths", label_lengths, N),
    ):
        known = _known(value)
        if known is not None and ((known < 0) | (known > limit)).any():
            raise ValueError(
                f"{name} of shape {known.shape} must lie in [0, {limit}], "
                f"got {known.min()} to {known.max()}"
            )
    ids, lengths = _known(labels), _known(label_lengths)
    if ids is None or lengths is None:
        return
    ids = ids[np.arange(N) < lengths[:, None]]
    if ((ids < 0) | (ids >= K)).any():
        raise ValueError(
            f"labels of shape {jnp.shape(labels)} must lie in [0, {K}) for logits of shape "
            f"{shape}, got {ids.min()} to {ids.max()}"
        )
    if (ids == blank_id).any():
        raise ValueError(
            f"labels of shape {jnp.shape(labels)} hold the blank, id {blank_id}, within "
            "label_lengths: remove it from the labels"
        )


def _known(value: jax.Array) -> np.ndarray | None:
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value)
