"""What a task that makes sound sounds like: a held-out utterance, made at each evaluation."""

import io
from typing import Any

import jax
import numpy as np
import soundfile
from jax.sharding import Mesh

from speech_jax import files
from speech_jax.data.pipeline import Corpus, first_row
from speech_jax.tasks import Task
from speech_jax.training import sharding
from speech_jax.workdir import Workdir

# So much of the utterance: a longer one takes the time of many updates.
_SECONDS = 2.0


class Generated:
    """Writes workdir.generated(step), a WAV of 16 bits, by a task that has `generate`."""

    def __init__(self, task: Task, corpus: Corpus, rate: int, mesh: Mesh, workdir: Workdir):
        """`rate` is in Hz; the utterance is the first one of `corpus` that can be read."""
        self._workdir, self._rate = workdir, rate
        self._batch = first_row(corpus, samples=round(_SECONDS * rate))
        self._make = jax.jit(task.generate, out_shardings=sharding.replicated(mesh))

    def write(self, params: Any, state: Any, step: int) -> None:
        """Makes the utterance with the model as it is after `step` updates.

        Raises:
          UserError: the file cannot be written.
        """
        if self._batch is None:
            return
        # Without a mesh that is set: a row cannot be split over its devices.
        made = self._make(params, state, self._batch, jax.random.key(step))
        if jax.process_index() == 0:
            length = int(self._batch["audio_length"][0])
            samples = np.asarray(made.addressable_data(0))[0, :length]
            sound = io.BytesIO()
            soundfile.write(sound, samples, self._rate, format="WAV", subtype="PCM_16")
            path = self._workdir.generated(step)
            with files.writing(path):
                files.write_atomically(path, sound.getvalue())
