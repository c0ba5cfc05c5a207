"""The CTC kernels are compiled for TPU and GPU as far as a machine without either can.

What they compute is tested in test_ctc.py; benchmarks/ctc_aot.py runs the platforms' own compilers.
"""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from speech_jax.ops.ctc import ctc_loss


def gpu_target():
    """An H200 to lower for; jax 0.10 needs none."""
    try:
        from jax.sharding import AbstractDevice
    except ImportError:
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize(
    ("implementation", "platform", "call"),
    [("pallas_tpu", "tpu", "tpu_custom_call"), ("pallas_gpu", "cuda", "mosaic_gpu")],
)
@pytest.mark.parametrize("labels", [60, 150])
def test_kernels_lower(implementation, platform, call, differentiated, labels):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32)
    shapes = (
        jax.ShapeDtypeStruct((16, 400, 1024), jnp.bfloat16), shape(16), shape(16, labels),
        shape(16),
    )  # fmt: skip
    loss = lambda *args: ctc_loss(*args, implementation=implementation, interpret=False).sum()
    function = jax.jit(jax.value_and_grad(loss) if differentiated else loss)
    with gpu_target() if platform == "cuda" else contextlib.nullcontext():
        text = function.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(f"custom_call @{call}") == 1
