"""transformers (PyTorch) beside ours: the same weights, the same batch, every number compared.

  python tests/hf_reference.py base large          # what CI runs on the published sizes
  python tests/hf_reference.py --write tests/data  # the golden files of test_hf.py

What runs theirs needs torch and transformers; what runs ours does not.
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
from speech_jax.deploy import hf
from speech_jax.ops import ctc
from speech_jax.tasks import pretrain
from speech_jax.tasks.asr import CTCModel

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
CONFIGS = {
    "tiny": SMALL,
    "tiny-layer-norm": SMALL | STABLE,
    "base": {},
    "large": LARGE | STABLE,
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
    config = transformers.Wav2Vec2Config(**CONFIGS[name] | PLAIN | changes)
    model = getattr(transformers, hf.HEADS[head])(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key or "original0" in key:
                parameter.add_(
                    0.1 * parameter.abs().mean().clamp(min=0.5) * torch.randn_like(parameter)
                )
    return model


def make_batch(samples: int, seed: int = 0, vocabulary: int = 12):
    """Three ragged waveforms, zero past their ends, with labels."""
    rng = np.random.default_rng(seed)
    lengths = np.array([samples, samples * 5 // 8, samples // 2 + 7], np.int32)
    audio = rng.standard_normal((3, samples)).astype(np.float32)
    audio *= np.arange(samples) < lengths[:, None]
    label_length = np.array([9, 4, 6], np.int32)
    labels = rng.integers(1, vocabulary, (3, 9)).astype(np.int32)
    labels *= np.arange(9) < label_length[:, None]
    return {"audio": audio, "audio_length": lengths, "labels": labels, "label_length": label_length}


def attention_mask(batch):
    return torch.tensor(np.arange(batch["audio"].shape[1]) < batch["audio_length"][:, None]).long()


def their_ctc(model, batch):
    """{'extractor', 'layer_i', 'last': their outputs, 'loss'} and the gradients by name."""
    outputs = {}
    for index, layer in enumerate(model.wav2vec2.encoder.layers):
        layer.register_forward_hook(
            lambda _, __, out, i=index: outputs.__setitem__(f"layer_{i}", _array(out))
        )
    model.wav2vec2.feature_extractor.register_forward_hook(
        lambda _, __, out: outputs.__setitem__("extractor", _array(out.transpose(1, 2)))
    )
    model.wav2vec2.register_forward_hook(
        lambda _, __, out: outputs.__setitem__("last", _array(out.last_hidden_state))
    )
    labels = (
        torch.tensor(batch["labels"])
        .long()
        .masked_fill(torch.tensor(np.arange(9) >= batch["label_length"][:, None]), -100)
    )
    result = model.train()(
        torch.tensor(batch["audio"]), attention_mask=attention_mask(batch), labels=labels
    )
    result.loss.backward()
    return outputs | {"loss": result.loss.item()}, _gradients(model)


_CAPTURED = ("Wav2Vec2", "FeatureExtractor", "Block")


def our_ctc(model: hf.Model, batch):
    """The same of ours, with the parameters' tree of gradients."""
    encoder = models.make_encoder(**model.encoder, scan=False, norm_padding=True)
    network = CTCModel(encoder, len(model.params["head"]["bias"]))

    def loss(params):
        (logits, frames), captured = network.apply(
            {"params": params},
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
    return pretrain.Draws(mask, mask, negatives, noise)


def their_pretraining(model, batch, draws):
    """{'loss', 'contrastive', 'perplexity'} and the gradients by name."""
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


def our_pretraining(model: hf.Model, config, batch, draws):
    """The same of ours, with the parameters' tree of gradients."""
    task = pretrain.Contrastive(
        models.make_encoder(**model.encoder, scan=False, norm_padding=True, input_dropout=0.0),
        frontend=None,
        groups=config["num_codevector_groups"],
        codes=config["num_codevectors_per_group"],
        code_features=config["codevector_dim"],
        final_features=config["proj_codevector_dim"],
        negatives=config["num_negatives"],
        penalty_weight=0.0,
    )

    def loss(params):
        total, _, sums = task.compare(params, batch["audio"], batch["audio_length"], draws)
        return total, sums

    (total, sums), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)
    return {"loss": float(total), **{k: float(v) for k, v in sums.items()}}, gradients


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


def _gradients(model):
    """By name; zero where nothing depends on a parameter."""
    return {
        name: np.zeros(p.shape, np.float32) if p.grad is None else _array(p.grad)
        for name, p in model.named_parameters()
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
    """The same for the pretraining objective: relative differences of values and gradients."""
    model = make(name, "pretraining", apply_spec_augment=True)
    model.save_pretrained(folder)
    config, batch = model.config.to_dict(), make_batch(samples)
    draws = make_draws(batch, config)
    theirs, their_gradients = their_pretraining(model, batch, draws)
    ours, gradients = our_pretraining(hf.read(folder), config, batch, draws)
    values = {key: abs(ours[key] - value) / abs(value) for key, value in theirs.items()}
    expected = hf.convert(their_gradients, config, "pretraining")
    return values, compare_gradients(expected, gradients)


# The golden files: models of a few thousand parameters.
MINIATURE = SMALL | {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": [8] * 6 + [12], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "codevector_dim": 8, "proj_codevector_dim": 12,
}  # fmt: skip
GOLDEN = {"base": ("ctc", {}), "large": ("ctc", STABLE), "pretraining": ("pretraining", {})}
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
