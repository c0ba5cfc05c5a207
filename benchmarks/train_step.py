"""A fine-tuning step of wav2vec2 with CTC: ours against transformers with PyTorch, taking turns.

  python -m benchmarks.train_step --model=wav2vec2-base --peer=transformers
  python -m benchmarks.train_step --model=wav2vec2-base --peer=transformers --frozen --json FILE

Both start from the same weights and get the same full batch; forward, backward and AdamW, without
dropout or masks. On CPU both compute in float32; on a GPU in bfloat16, the peer through
torch.compile. `--frozen` leaves the feature extractor out of training, as fine-tuning does. MFU is
of the arithmetic of the unfused program, over the peak of speech_jax/training/costs.py.
"""

import argparse
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import table
from speech_jax import models
from speech_jax.bundle import huggingface as hf
from speech_jax.ops import ctc
from speech_jax.tasks.recognize import CTCModel
from speech_jax.training import costs as flops

SIZES = {
    "wav2vec2-base": {},
    "wav2vec2-large": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096, "do_stable_layer_norm": True, "feat_extract_norm": "layer",
        "conv_bias": True,
    },
}  # fmt: skip
LEARNING_RATE = 1e-5


def make_batch(rows, seconds, vocabulary=32):
    """Full rows of noise and labels at about the rate of speech."""
    rng = np.random.default_rng(0)
    samples, labels = round(seconds * 16_000), round(seconds * 12)
    return {
        "audio": rng.standard_normal((rows, samples)).astype(np.float32),
        "audio_length": np.full(rows, samples, np.int32),
        "labels": rng.integers(1, vocabulary, (rows, labels)).astype(np.int32),
        "labels_length": np.full(rows, labels, np.int32),
    }


def ours(folder, batch, *, dtype, frozen):
    """(step, FLOPs): a compiled step that keeps its state, and its arithmetic."""
    model = hf.read(folder)
    settings = dict(model.config.model) | {
        "scan": False,
        "norm_padding": True,
        "dropout": 0.0,
        "input_dropout": 0.0,
        "feature_gradient": 0.0 if frozen else 1.0,
        "dtype": dtype,
    }
    encoder = models.make_encoder(**settings)
    network = CTCModel(encoder, len(model.params["head"]["bias"]))
    mask = jax.tree.map(lambda _: True, model.params)
    if frozen:
        mask["encoder"]["extractor"] = jax.tree.map(lambda _: False, mask["encoder"]["extractor"])
    tx = optax.masked(optax.adamw(LEARNING_RATE, weight_decay=0.01), mask)

    def step(params, state, batch):
        def loss(params):
            logits, frames = network.apply(
                {"params": params}, batch["audio"], batch["audio_length"], True
            )
            return ctc.ctc_loss(logits, frames, batch["labels"], batch["labels_length"]).sum()

        value, gradient = jax.value_and_grad(loss)(params)
        if frozen:
            zeros = jax.tree.map(jnp.zeros_like, gradient["encoder"]["extractor"])
            gradient["encoder"] = gradient["encoder"] | {"extractor": zeros}
        changes, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, changes), state, value

    params = jax.tree.map(jnp.asarray, model.params)
    batch = jax.tree.map(jnp.asarray, batch)
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(params, tx.init(params), batch)
    compiled = traced.lower().compile()
    held = [params, tx.init(params)]

    def run():
        held[0], held[1], value = compiled(*held, batch)
        return float(value)

    return run, flops.matmul_flops(traced.jaxpr)


def transformers_step(folder, batch, *, device, frozen):
    """The peer's step, in training mode; every random part is off in its configuration."""
    import torch
    from transformers import Wav2Vec2ForCTC

    model = Wav2Vec2ForCTC.from_pretrained(folder).to(device).train()
    if frozen:
        model.freeze_feature_encoder()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    audio = torch.tensor(batch["audio"], device=device)
    labels = torch.tensor(batch["labels"], device=device).long()
    mask = torch.ones_like(audio, dtype=torch.long)
    forward = torch.compile(model) if device == "cuda" else model

    def run():
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            loss = forward(audio, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def write_peer(name, folder):
    """A folder with the peer's random weights, nothing random in training."""
    import torch
    import transformers

    torch.manual_seed(0)
    off = ("hidden", "activation", "attention", "feat_proj", "final")
    quiet = {f"{place}_dropout": 0.0 for place in off}
    config = transformers.Wav2Vec2Config(
        **SIZES[name], **quiet, layerdrop=0.0, apply_spec_augment=False
    )
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="wav2vec2-base")
    parser.add_argument("--peer", choices=("transformers",), default="transformers")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    chosen = parser.parse_args()

    gpu = jax.devices()[0].platform == "gpu"
    batch = make_batch(chosen.rows, chosen.seconds)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_peer(chosen.model, folder)
        dtype = jnp.bfloat16 if gpu else jnp.float32
        step, arithmetic = ours(folder, batch, dtype=dtype, frozen=chosen.frozen)
        device = "cuda" if gpu else "cpu"
        peer = transformers_step(folder, batch, device=device, frozen=chosen.frozen)
    calls = {"speech_jax": step, chosen.peer: peer}
    losses = {name: call() for name, call in calls.items()}  # equal, or they do different work
    seconds = table.interleaved_medians(calls, repeats=chosen.repeats, warmup=1)
    rows = [
        {
            "step": name,
            "frozen": chosen.frozen,
            "first loss": losses[name],
            "seconds": time,
            "audio s/s": chosen.rows * chosen.seconds / time,
            "MFU": arithmetic / time / flops.peak_flops(),
            "speed-up": seconds[chosen.peer] / time,
        }
        for name, time in seconds.items()
    ]
    table.report(rows, file=chosen.json)


if __name__ == "__main__":
    main()
