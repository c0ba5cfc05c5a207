"""The training loop's parts on any mesh, to see what it computes; run as a script by two processes.

python follow.py ROOT WORKDIR CHECKPOINTS OUTPUT COORDINATOR PROCESS
"""

import json
import math
import pathlib
import sys

import jax

import runs
from speech_jax import experiment
from speech_jax.data.batch import signature
from speech_jax.setup import make_setup
from speech_jax.training import checkpoint, sharding

STEPS, SAVED = 20, 10


class Run:
    """A tiny run on a mesh of (data, fsdp, tensor), compiled once, started as often as wanted."""

    def __init__(self, root, workdir, shape, devices=None):
        self.config, workdir = runs.tiny_config(root), pathlib.Path(workdir)
        self.config.train.steps = STEPS
        self.mesh = sharding.make_mesh(*shape, devices=devices)
        source = experiment.open_training(self.config)
        # Rows for eight devices, and no more on one.
        longest = math.ceil(10 * max(one.duration for one in source.utterances)) / 10
        self.config.data.batch_seconds = 8 * longest
        parts = experiment.make_parts(self.config, workdir, source)
        task = experiment.make_task(self.config, parts)
        self.corpus = experiment.training_corpus(self.config, source, parts, task)
        self.plan = experiment.training_plan(self.config, self.corpus, task, self.mesh)
        self.setup = make_setup(
            self.config, task, self.corpus.fields, self.mesh, self.plan.buckets[0]
        )
        self.init = jax.jit(self.setup.init, out_shardings=self.setup.shardings)
        self.programs = self.setup.compile(self.plan.buckets)

    def go(self, first: int, last: int, restore=None, save=None) -> dict:
        """Steps first+1 to last: 'losses' per label, and 'ids' of this process's rows."""
        state = self.init()
        if restore is not None:
            with checkpoint.Checkpoints(restore) as checkpoints:
                restored = checkpoints.restore(self.setup.abstract)
            assert restored.data["next_batch"] == first
            state = restored.state
        batches = experiment.training_batches(self.config, self.corpus, self.plan, first)
        losses, ids = [], []
        for step in range(first + 1, last + 1):
            batch = next(batches)
            before = state.sums
            before = {name: float(before[name]) for name in ("loss", "weight")}
            placed = sharding.put_batch(batch, self.mesh)
            state, sums, _ = self.programs.at(step, signature(batch)).run(state, placed)
            # The sums are of this step and those before it since the last logged one.
            loss, weight = (float(sums[name]) - before[name] for name in ("loss", "weight"))
            losses.append(loss / weight)
            ids.append(batch["index"].tolist())
            if save is not None and step == SAVED:
                with checkpoint.Checkpoints(save) as checkpoints:
                    checkpoints.save(step, state, data={"next_batch": step}, stopper={}, config={})
        batches.close()
        self.state = state
        return {"losses": losses, "ids": ids}


if __name__ == "__main__":
    root, workdir, checkpoints, output, coordinator, process = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, int(process))
    run = Run(root, workdir, (2, 2, 2))
    found = {
        "fresh": run.go(0, STEPS),
        "restored": run.go(SAVED, SAVED + 3, restore=checkpoints),
    }
    pathlib.Path(output).write_text(json.dumps(found))
