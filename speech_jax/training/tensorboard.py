"""TensorBoard's event files."""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter


class Events:
    """Appends points of plots to a file, in the thread that asks for it: it raises OSError."""

    def __init__(self, path: pathlib.Path, step: int):
        """`step` updates are done: TensorBoard hides the points of later ones in older files."""
        self._file = RecordWriter(str(path))
        self._add(0, file_version="brain.Event:2")
        if step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step + 1, session_log=start)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """A point in the plot of each name."""
        for name, value in values.items():
            self._add(step, summary=summary.scalar(name, value))

    def flush(self) -> None:
        """Writes what the file holds back."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, step: int, **content: Any) -> None:
        event = event_pb2.Event(wall_time=time.time(), step=step, **content)
        self._file.write(event.SerializeToString())
