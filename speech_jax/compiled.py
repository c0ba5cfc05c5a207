"""Compiled programs, kept from one run to the next in the cache of the data.

JAX keeps them by the program, its own version and the kind of device. It does not ask which
instructions the processor has, and a program that another machine compiled for itself may end a
process (SIGILL): so each kind of processor has a folder of its own here.
"""

import contextlib
import hashlib
import os
import pathlib
import platform

from speech_jax import files

LIMIT = 2 << 30  # bytes of all programs; the oldest go
CPUS = pathlib.Path("/proc/cpuinfo")


def keep(cache: pathlib.Path) -> None:
    """Has JAX keep what takes long to compile in `cache`, and use what is there.

    Where JAX_COMPILATION_CACHE_DIR names another folder, that one is used, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. A folder that cannot be written is none.
    """
    import jax
    import jaxlib

    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    if files.is_remote(cache):
        return
    folder = cache / "programs" / f"jaxlib-{jaxlib.__version__}-{_processor()}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        _trim(folder.parent)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _processor() -> str:
    """A digest of the processor's kind, cores and instructions, as far as the system tells them."""
    told = [platform.machine(), platform.processor(), str(os.cpu_count())]
    with contextlib.suppress(OSError):
        lines = CPUS.read_text().split("\n\n")[0].splitlines()
        kinds = ("vendor", "cpu family", "model", "stepping", "flags", "features", "cpu ")
        told += [line for line in lines if line.lower().startswith(kinds) and "MHz" not in line]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def _trim(folder: pathlib.Path) -> None:
    """Removes the oldest programs beyond LIMIT; others may do so at the same time."""
    found = []
    for path in folder.glob("*/*"):
        with contextlib.suppress(OSError):
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= LIMIT:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size
