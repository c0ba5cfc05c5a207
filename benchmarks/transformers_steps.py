"""Steps of ours and of transformers with PyTorch that do the same work, to be timed in turns.

Of wav2vec2, a fine-tuning step with CTC: both start from the same weights and get the same full
batch; forward, backward and AdamW, without dropout or masks. Of a Conformer, forward and backward
of the encoder: the layers alone on hidden frames every 40 ms, or with what each side puts in front
of them (log-mel and two strided 3x3 convolutions; eight strided convolutions of the waveform),
Wav2Vec2ConformerEncoder being of equal width, depth, heads, feed-forward, kernel and frame rate.
On CPU both compute in float32; on a GPU in bfloat16, the peer through torch.compile.
"""

import pathlib
import tempfile
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from speech_jax import config as defaults
from speech_jax import experiment, models
from speech_jax.bundle import huggingface as hf
from speech_jax.models import conformer
from speech_jax.ops import ctc
from speech_jax.preflight import assumed
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


def fine_tuning(
    name: str, rows: int, seconds: float, *, frozen: bool
) -> tuple[dict[str, Callable[[], float]], float]:
    """A step of wav2vec2, ours and theirs, and its FLOPs."""
    gpu = jax.devices()[0].platform == "gpu"
    batch = make_batch(rows, seconds)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_peer(name, folder)
        dtype = jnp.bfloat16 if gpu else jnp.float32
        step, arithmetic = ours(folder, batch, dtype=dtype, frozen=frozen)
        device = "cuda" if gpu else "cpu"
        peer = transformers_step(folder, batch, device=device, frozen=frozen)
    return {"speech_jax": step, "transformers": peer}, arithmetic


# ---- Conformer -----------------------------------------------------------------------------------

KERNEL, HEADS = 31, 4
# Of the peer's extractor: a frame every 40 ms of 16 kHz audio.
EXTRACTOR = {
    "conv_dim": (512,) * 8, "conv_kernel": (10, 3, 3, 3, 3, 2, 2, 2),
    "conv_stride": (5, 2, 2, 2, 2, 2, 2, 2),
}  # fmt: skip


def encoders(
    width: int, layers: int, rows: int, seconds: float, *, front: bool
) -> tuple[dict[str, Callable[[], float]], float]:
    """Forward and backward of a Conformer, ours and theirs, and the FLOPs of ours."""
    step, arithmetic = _our_encoder(width, layers, rows, seconds, front)
    peer = _their_encoder(width, layers, rows, seconds, front)
    return {"speech_jax": step, "transformers": peer}, arithmetic


class _Layers(nn.Module):
    """The layers of a Conformer."""

    settings: dict
    count: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        for layer in range(self.count):
            x, _ = conformer.Block(**self.settings, name=f"layer_{layer}")(x, mask, None)
        return x


def _our_encoder(width, layers, rows, seconds, front) -> tuple[Callable[[], float], float]:
    dtype = jnp.bfloat16 if jax.devices()[0].platform == "gpu" else jnp.float32
    encoder = models.make_encoder(
        **models.settings(
            "conformer", "s", width=width, num_layers=layers, heads=HEADS, kernel=KERNEL,
            dropout=0.0, scan=False, dtype=dtype,
        )
    )  # fmt: skip
    rng = np.random.default_rng(0)
    if front:
        config = defaults.default()
        frontend = experiment.make_frontend(config, encoder, assumed.make_parts(config, 32))
        samples = 1000 * rng.standard_normal((rows, round(16_000 * seconds)))
        length = jnp.full(rows, samples.shape[1], jnp.int32)
        inputs = {"audio": jnp.asarray(samples, jnp.int16), "audio_length": length}

        def run(params, batch):
            return encoder.apply(params, *frontend(batch), True)[0]

        params = jax.jit(encoder.init, static_argnums=3)(
            jax.random.key(0), *jax.jit(frontend.__call__)(inputs), True
        )
    else:
        stack = _Layers(encoder.block_settings(), layers)
        inputs = jnp.asarray(rng.standard_normal((rows, round(25 * seconds), width)), dtype)
        mask = jnp.ones(inputs.shape[:2], bool)
        run = lambda params, inputs: stack.apply(params, inputs, mask)
        params = jax.jit(stack.init)(jax.random.key(0), inputs, mask)

    def step(params, inputs):
        return jax.value_and_grad(
            lambda params: jnp.square(run(params, inputs).astype(jnp.float32)).sum()
        )(params)

    traced = jax.jit(step).trace(params, inputs)
    compiled = traced.lower().compile()
    return lambda: float(jax.block_until_ready(compiled(params, inputs))[0]), flops.matmul_flops(
        traced.jaxpr
    )


def _their_encoder(width, layers, rows, seconds, front) -> Callable[[], float]:
    import torch
    import transformers
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as modeling

    off = ("hidden", "activation", "attention", "feat_proj", "final")
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=HEADS,
        intermediate_size=4 * width, conv_depthwise_kernel_size=KERNEL,
        position_embeddings_type="rotary", apply_spec_augment=False, layerdrop=0.0,
        conformer_conv_dropout=0.0, **{f"{place}_dropout": 0.0 for place in off}, **EXTRACTOR,
    )  # fmt: skip
    config._attn_implementation = "eager"  # the only one that it has
    torch.manual_seed(0)
    cuda = jax.devices()[0].platform == "gpu"
    device = "cuda" if cuda else "cpu"
    if front:
        model = modeling.Wav2Vec2ConformerModel(config)
        inputs = torch.randn(rows, round(16_000 * seconds), device=device)
    else:
        model = modeling.Wav2Vec2ConformerEncoder(config)
        inputs = torch.randn(rows, round(25 * seconds), width, device=device)
    model = model.to(device).train()
    forward = torch.compile(model) if cuda else model

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            loss = forward(inputs).last_hidden_state.float().square().sum()
        loss.backward()
        model.zero_grad()
        return loss.item()

    return step
