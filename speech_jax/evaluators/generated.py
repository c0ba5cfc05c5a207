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
        self._whole = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
        self._make = jax.jit(task.generate)

    def write(self, params: Any, state: Any, step: int) -> None:
        """Makes the utterance with the model as it is after `step` updates.

        Raises:
          UserError: the file cannot be written.
        """
        # On one device: several would wait for each other in each of the steps of a sample.
        whole = self._whole((params, state))
        if jax.process_index() or self._batch is None:
            return
        whole = jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)
        made = np.asarray(self._make(*whole, self._batch, jax.random.key(step)))
        sound = io.BytesIO()
        samples = made[0, : int(self._batch["audio_length"][0])]
        soundfile.write(sound, samples, self._rate, format="WAV", subtype="PCM_16")
        path = self._workdir.generated(step)
        with files.writing(path):
            files.write_atomically(path, sound.getvalue())
