"""transformers (PyTorch) beside ours: the same weights, the same batch, every number compared.

  python tests/hf_reference.py base large          # what CI runs on the published sizes
  python tests/hf_reference.py --write tests/data  # the golden files of test_hf.py

What runs theirs needs torch and transformers; what runs ours does not.

In their Conformers padding changes the output, through depthwise convolutions and, in training,
batch norm. They are therefore given each utterance of a ragged batch alone, and in training full
rows; ours gets the ragged batch.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from speech_jax import models
from speech_jax.bundle import huggingface as hf
from speech_jax.bundle.format import Bundle
from speech_jax.bundle.names import architecture
from speech_jax.ops import ctc
from speech_jax.tasks import contrastive
from speech_jax.tasks.recognize import CTCModel

try:
    import torch
    import transformers
except ImportError:
    torch = None

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": [16, 24, 24, 24, 24, 24, 32], "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "vocab_size": 12, "num_codevectors_per_group": 20,
    "codevector_dim": 16, "proj_codevector_dim": 24, "num_negatives": 7, "classifier_proj_size": 20,
}  # fmt: skip
LARGE = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "proj_codevector_dim": 768, "codevector_dim": 768,
}  # fmt: skip
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
CONFORMER = {
    "feat_extract_norm": "layer", "conv_bias": True, "hidden_act": "swish",
    "conformer_conv_dropout": 0.0, "position_embeddings_type": "relative",
}  # fmt: skip
ROTARY = CONFORMER | {"position_embeddings_type": "rotary"}
CONFIGS = {
    "tiny": SMALL,
    "tiny-layer-norm": SMALL | STABLE,
    "tiny-conformer": SMALL | CONFORMER | {"conv_depthwise_kernel_size": 5},
    "tiny-conformer-rotary": SMALL | ROTARY | {"conv_depthwise_kernel_size": 5},
    "base": {},
    "large": LARGE | STABLE,
    "conformer": LARGE | CONFORMER,
    "conformer-rotary": LARGE | ROTARY,
}
# Nothing random in training, unless a test asks for it.
PLAIN = {
    "hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0, "feat_quantizer_dropout": 0.0, "final_dropout": 0.0,
    "layerdrop": 0.0, "apply_spec_augment": False,
}  # fmt: skip


def make(name: str, head: str, **changes):
    """A transformers model with random weights; norms, biases and embeddings are random too."""
    torch.manual_seed(0)
    settings = CONFIGS[name] | PLAIN | changes
    if "position_embeddings_type" in settings:
        encoder, config = "wav2vec2_conformer", transformers.Wav2Vec2ConformerConfig(**settings)
    else:
        encoder, config = "wav2vec2", transformers.Wav2Vec2Config(**settings)
    model = getattr(transformers, architecture(head, encoder))(config)
    with torch.no_grad():
        for _, statistic in _statistics(model):
            statistic.add_(0.2 * torch.randn_like(statistic).abs())
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key or "original0" in key:
                parameter.add_(
                    0.1 * parameter.abs().mean().clamp(min=0.5) * torch.randn_like(parameter)
                )
    return model


def make_batch(samples: int, seed: int = 0, vocabulary: int = 12, ragged: bool = True):
    """Three waveforms, zero past their ends, with labels."""
    rng = np.random.default_rng(seed)
    lengths = np.array([samples, samples * 5 // 8, samples // 2 + 7], np.int32)
    lengths = lengths if ragged else np.full(3, samples, np.int32)
    audio = rng.standard_normal((3, samples)).astype(np.float32)
    audio *= np.arange(samples) < lengths[:, None]
    label_length = np.array([9, 4, 6], np.int32)
    labels = rng.integers(1, vocabulary, (3, 9)).astype(np.int32)
    labels *= np.arange(9) < label_length[:, None]
    return {"audio": audio, "audio_length": lengths, "labels": labels, "label_length": label_length}


def attention_mask(batch):
    return torch.tensor(np.arange(batch["audio"].shape[1]) < batch["audio_length"][:, None]).long()


def their_ctc(model, batch):
    """{'extractor', 'layer_i', 'last': their outputs, 'loss'} and the gradients by name.

    A Conformer's are of each utterance alone, as in evaluation.
    """
    if not _is_conformer(model):
        outputs = _their_ctc(model.train(), batch)
    else:
        rows = []
        for row, length in enumerate(batch["audio_length"]):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            rows.append(_their_ctc(model.eval(), one | {"audio": one["audio"][:, :length]}))
        outputs = {name: _stack([row[name] for row in rows]) for name in rows[0]}
    return outputs, _gradients(model)


def _their_ctc(model, batch):
    outputs = {}
    encoder = model.base_model
    keep = lambda name, value: outputs.__setitem__(name, _array(value))
    hooks = [
        layer.register_forward_hook(lambda _, __, out, i=index: keep(f"layer_{i}", out))
        for index, layer in enumerate(encoder.encoder.layers)
    ]
    hooks.append(
        encoder.feature_extractor.register_forward_hook(
            lambda _, __, out: keep("extractor", out.transpose(1, 2))
        )
    )
    hooks.append(
        encoder.register_forward_hook(lambda _, __, out: keep("last", out.last_hidden_state))
    )
    labels = (
        torch.tensor(batch["labels"])
        .long()
        .masked_fill(torch.tensor(np.arange(9) >= batch["label_length"][:, None]), -100)
    )
    result = model(
        torch.tensor(batch["audio"]), attention_mask=attention_mask(batch), labels=labels
    )
    result.loss.backward()
    for hook in hooks:
        hook.remove()
    return outputs | {"loss": result.loss.item()}


def _stack(rows):
    """Outputs [1, T, D] of utterances as one [B, T, D], zero past their ends; losses are added."""
    if not isinstance(rows[0], np.ndarray):
        return sum(rows)
    frames = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, 0), (0, frames - row.shape[1]), (0, 0))) for row in rows]
    )


_CAPTURED = ("Wav2Vec2", "Wav2Vec2Conformer", "FeatureExtractor", "Block")


def our_ctc(model: Bundle, batch):
    """The same of ours, with the parameters' tree of gradients."""
    settings = model.config.model.to_dict()
    settings["norm_padding"] = settings["name"] == "wav2vec2"
    network = CTCModel(models.make_encoder(**settings), len(model.params["head"]["bias"]))

    def loss(params):
        (logits, frames), captured = network.apply(
            {"params": params, **model.state},
            jnp.asarray(batch["audio"]),
            jnp.asarray(batch["audio_length"]),
            True,
            capture_intermediates=lambda module, method: (
                method == "__call__" and type(module).__name__ in _CAPTURED
            ),
        )
        nats = ctc.ctc_loss(logits, frames, batch["labels"], batch["label_length"])
        return nats.sum(), (captured["intermediates"]["encoder"], frames)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, (captured, frames)), gradients = run(model.params)
    outputs = {name: value["__call__"][0] for name, value in captured.items() if name != "__call__"}
    outputs = {name: out[0] if isinstance(out, tuple) else out for name, out in outputs.items()}
    outputs["last"] = captured["__call__"][0][0]
    return outputs | {"loss": float(total)}, gradients, np.asarray(frames)


def make_draws(batch, config, seed: int = 0):
    """Masks, negatives and Gumbel noise for a batch, as numpy."""
    rng = np.random.default_rng(seed)
    encoder = models.make_encoder("wav2vec2")
    frames = encoder.output_lengths(batch["audio"].shape[1])
    valid = np.arange(frames) < np.asarray(encoder.output_lengths(batch["audio_length"]))[:, None]
    mask = (rng.random(valid.shape) < 0.5) & valid
    negatives = np.zeros((*mask.shape, config["num_negatives"]), np.int32)
    for row, masked in enumerate(mask):
        for frame in np.flatnonzero(masked):
            others = np.setdiff1d(np.flatnonzero(masked), [frame])
            negatives[row, frame] = rng.choice(others, negatives.shape[2])
    shape = (config["num_codevector_groups"], config["num_codevectors_per_group"])
    noise = rng.gumbel(size=(*mask.shape, *shape)).astype(np.float32)
    return contrastive.Draws(mask, mask, negatives, noise)


def their_pretraining(model, batch, draws):
    """{'loss', 'contrastive', 'perplexity'} and the gradients by name; statistics move on."""
    noise = torch.tensor(draws.noise)

    def gumbel_softmax(logits, tau, hard):
        assert hard
        soft = ((logits + noise.reshape(logits.shape)) / tau).softmax(-1)
        one_hot = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return one_hot - soft.detach() + soft

    offset = len(draws.mask[0]) * np.arange(len(draws.mask))[:, None, None]
    original = torch.nn.functional.gumbel_softmax
    torch.nn.functional.gumbel_softmax = gumbel_softmax
    try:
        result = model.train()(
            torch.tensor(batch["audio"]),
            attention_mask=attention_mask(batch),
            mask_time_indices=torch.tensor(draws.mask),
            sampled_negative_indices=torch.tensor(draws.negatives + offset),
        )
    finally:
        torch.nn.functional.gumbel_softmax = original
    result.loss.backward()
    values = {
        "loss": result.loss.item(),
        "contrastive": result.contrastive_loss.item(),
        "soft_code_perplexity": result.codevector_perplexity.item(),
    }
    return values, _gradients(model)


def our_pretraining(model: Bundle, config, batch, draws):
    """The same of ours, with the parameters' tree of gradients and the new model state."""
    quiet = {"norm_padding": True, "dropout": 0.0, "input_dropout": 0.0}
    arguments = model.config.task.to_dict()
    assert arguments.pop("name") == "contrastive"
    arguments |= {"negatives": config["num_negatives"], "penalty_weight": 0.0}
    task = contrastive.Contrastive(
        models.make_encoder(**(model.config.model.to_dict() | quiet)),
        frontend=None,
        **(arguments | {"feature_dropout": 0.0}),
    )

    def loss(params):
        total, _, aux = task.compare(
            params,
            model.state,
            batch["audio"],
            batch["audio_length"],
            draws,
            dropout_rng=jax.random.key(0),
        )
        return total, aux

    (total, aux), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)
    sums = {name: float(value) for name, value in aux["sums"].items()}
    return {"loss": float(total), **sums}, gradients, aux["state"]


def compare(theirs, ours, frames) -> dict[str, float]:
    """The largest absolute difference of every output on valid frames, and the loss's relative."""
    worst = {}
    for name, value in theirs.items():
        if name == "loss":
            worst[name] = abs(value - ours[name]) / abs(value)
            continue
        valid = np.arange(value.shape[1]) < frames[:, None]
        worst[name] = float(np.abs(value - np.asarray(ours[name]))[valid].max())
    return worst


def compare_gradients(theirs, ours) -> dict[str, float]:
    """Norm of the difference over the norm, for every parameter of ours."""
    by_path = dict(jax.tree_util.tree_leaves_with_path(theirs))
    result = {}
    for path, gradient in jax.tree_util.tree_leaves_with_path(ours):
        expected = by_path[path]
        norm = np.linalg.norm(expected)
        if norm or np.any(gradient):
            difference = np.linalg.norm(np.asarray(gradient) - expected)
            result[jax.tree_util.keystr(path, simple=True, separator="/")] = float(
                difference / norm
            )
    return result


def _array(tensor):
    return tensor.detach().numpy()


def _is_conformer(model) -> bool:
    return model.base_model_prefix == "wav2vec2_conformer"


def _statistics(model):
    """(name, buffer) of batch norm's running statistics."""
    return [(name, b) for name, b in model.named_buffers() if "running" in name]


def _gradients(model):
    """By name; zero where nothing depends on a parameter, and for statistics."""
    tensors = [*model.named_parameters(), *_statistics(model)]
    return {
        name: np.zeros(p.shape, np.float32) if p.grad is None else _array(p.grad)
        for name, p in tensors
    }


def check(name: str, samples: int, folder: pathlib.Path):
    """Saves a CTC model of transformers, loads it with ours and compares both on a batch."""
    model = make(name, "ctc")
    model.save_pretrained(folder)
    loaded = hf.read(folder)
    batch = make_batch(samples)
    theirs, their_gradients = their_ctc(model, batch)
    ours, gradients, frames = our_ctc(loaded, batch)
    expected = hf.convert(their_gradients, model.config.to_dict(), "ctc")
    return compare(theirs, ours, frames), compare_gradients(expected, gradients)


def check_pretraining(name: str, samples: int, folder: pathlib.Path):
    """The same for the pretraining objective: relative differences of values and gradients.

    Of batch norm's statistics after it too: "mean", and "variance", which is not quite equal, for
    theirs divides by one less than the number of frames.
    """
    model = make(name, "pretraining", apply_spec_augment=True)
    model.save_pretrained(folder)
    config = model.config.to_dict()
    batch = make_batch(samples, ragged=not _is_conformer(model))
    draws = make_draws(batch, config)
    theirs, their_gradients = their_pretraining(model, batch, draws)
    ours, gradients, state = our_pretraining(hf.read(folder), config, batch, draws)
    values = {key: abs(ours[key] - value) / abs(value) for key, value in theirs.items()}
    expected = hf.convert(their_gradients, config, "pretraining")
    gradients = compare_gradients(expected, gradients)
    if _is_conformer(model):
        model.save_pretrained(folder)
        moved = compare_gradients(hf.read(folder).state, state)
        values["mean"] = max(value for path, value in moved.items() if path.endswith("mean"))
        values["variance"] = max(
            value for path, value in moved.items() if path.endswith("variance")
        )
    return values, gradients


# The golden files: models of a few thousand parameters.
MINIATURE = SMALL | {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": [8] * 6 + [12], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "codevector_dim": 8, "proj_codevector_dim": 12,
}  # fmt: skip
GOLDEN = {
    "base": ("ctc", {}),
    "large": ("ctc", STABLE),
    "pretraining": ("pretraining", {}),
    "conformer": ("ctc", CONFORMER | {"conv_depthwise_kernel_size": 5}),
    "conformer_rotary": ("ctc", ROTARY | {"conv_depthwise_kernel_size": 5}),
}
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEF'"]


def write_golden(root: pathlib.Path) -> None:
    """Folders as transformers writes them, one in the older format, with expected.npz in each."""
    for name, (head, changes) in GOLDEN.items():
        folder = root / f"wav2vec2_{name}"
        CONFIGS["miniature"] = MINIATURE | changes
        model = make("miniature", head, apply_spec_augment=head == "pretraining")
        model.save_pretrained(folder)
        config, batch = model.config.to_dict(), make_batch(6_400)
        if head == "ctc":
            values, gradients = their_ctc(model, batch)
            draws = {}
        else:
            draws = make_draws(batch, config)
            values, gradients = their_pretraining(model, batch, draws)
            draws = {f"draws/{key}": value for key, value in draws._asdict().items()}
        if name == "base":
            (folder / "model.safetensors").unlink()
            old = {
                key.replace("parametrizations.weight.original0", "weight_g").replace(
                    "parametrizations.weight.original1", "weight_v"
                ): value
                for key, value in model.state_dict().items()
            }
            torch.save(old, folder / "pytorch_model.bin")
            ids = {symbol: i for i, symbol in enumerate(VOCABULARY)}
            (folder / "vocab.json").write_text(json.dumps(ids) + "\n")
        np.savez_compressed(
            folder / "expected.npz",
            **{f"batch/{key}": value for key, value in batch.items()},
            **{f"value/{key}": value for key, value in values.items()},
            **{f"gradient/{key}": value for key, value in gradients.items()},
            **draws,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=[*CONFIGS, []])
    parser.add_argument("--samples", type=int, default=16_000)
    parser.add_argument("--write", type=pathlib.Path)
    chosen = parser.parse_args()
    failed = False
    for name in chosen.models:
        with tempfile.TemporaryDirectory() as folder:
            outputs, gradients = check(name, chosen.samples, pathlib.Path(folder))
        with tempfile.TemporaryDirectory() as folder:
            values, more = check_pretraining(name, chosen.samples, pathlib.Path(folder))
        loss = outputs.pop("loss")
        failed |= values.pop("variance", 0.0) > 1e-2
        gradients |= {f"pretraining {path}": value for path, value in more.items()}
        worst = max(outputs, key=outputs.get), max(gradients, key=gradients.get)
        print(
            f"{name}: hidden states {outputs[worst[0]]:.1e} ({worst[0]}), CTC loss {loss:.1e} "
            f"relative, pretraining loss {max(values.values()):.1e} relative, gradients "
            f"{gradients[worst[1]]:.1e} relative ({worst[1]})",
            flush=True,
        )
        failed |= outputs[worst[0]] > 2e-4 or gradients[worst[1]] > 1e-3
        failed |= max(loss, *values.values()) > 1e-4
    if chosen.write:
        write_golden(chosen.write)
    return failed


if __name__ == "__main__":
    sys.exit(main())
