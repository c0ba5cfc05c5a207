"""A digest of all parameters of a model: two runs that print the same are equal bit for bit.

python -m benchmarks.digest runs/quickstart [FOLDER ...]
"""

import argparse
import hashlib
from collections.abc import Mapping

import flax.traverse_util
import numpy as np

from speech_jax import bundle


def digest(folder: str) -> tuple[str, int]:
    """(the digest of a model's parameters and state, number of leaves)."""
    model = bundle.open(folder)
    tree = {"params": model.params, "state": model.state}
    leaves = flax.traverse_util.flatten_dict(tree, sep="/")
    return of(leaves), len(leaves)


def of(leaves: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and bytes in the order of names."""
    total = hashlib.sha256()
    for name in sorted(leaves):
        array = np.ascontiguousarray(leaves[name])
        total.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return total.hexdigest()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="+", help="a workdir, a saved bundle, or of Hugging Face")
    for folder in parser.parse_args().folder:
        found, count = digest(folder)
        print(f"{found}  {count} leaves  {folder}")


if __name__ == "__main__":
    main()
