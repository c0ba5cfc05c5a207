"""Pictures of measures."""

import io
import pathlib
from typing import TYPE_CHECKING

from speech_jax import files

if TYPE_CHECKING:  # it takes half a second, and most runs draw nothing
    from matplotlib.figure import Figure


def save(figure: "Figure", path: pathlib.Path) -> None:
    """Writes a figure in the format that the end of `path` names, which may be in a bucket.

    Raises:
      UserError: it cannot be written.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=120)
    with files.writing(path):
        files.write_atomically(path, drawn.getvalue())
