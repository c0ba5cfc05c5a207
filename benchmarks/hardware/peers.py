"""The same training steps in PyTorch, by transformers: what a user would pick instead.

Wav2Vec2ConformerForCTC of equal width, depth, heads, feed-forward, kernel and frame rate (40 ms by
one more convolution of stride 2), and Wav2Vec2ForCTC; bfloat16 autocast, fused AdamW, clipping,
dropout .1, on full rows of noise with their attention mask; without SpecAugment, which
transformers draws on the host. Through torch.compile first, then eager. --only names the models.
"""

import argparse
import time

from benchmarks.hardware import Table, alone, left, median_seconds, run_part
from benchmarks.hardware.shapes import ROW_SECONDS, SIZES

RATE = 16_000


def run(table: Table, flags: argparse.Namespace) -> None:
    """A row for each model and way to run it."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    table.add("torch", version=torch.__version__, device=device)
    names = flags.only.split(",") if flags.only else ("conformer-l", "wav2vec2-base")
    held = {}
    for compiled in (True, False):
        for name in names:
            way = "torch.compile" if compiled else "eager"
            seconds = 2.0 if flags.tiny else ROW_SECONDS
            if left(flags) < 5:
                return
            rows = round((4.0 if flags.tiny else SIZES[name][0]) / seconds)
            what = f"{name}, {rows} rows of {seconds:g} s, {way}"
            with table.attempt(what):
                if name not in held:
                    held[name] = make(name, flags.tiny).to(device).train()
                _measure(table, flags, what, held[name], rows, seconds, name, compiled)
            if device == "cuda":
                torch.cuda.empty_cache()


def make(name: str, tiny: bool):
    """The peer of a model."""
    import transformers

    quiet = {"apply_spec_augment": False, "layerdrop": 0.0, "ctc_loss_reduction": "sum"}
    if tiny:
        quiet |= {
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 128, "conv_dim": (32,) * 7, "num_conv_pos_embedding_groups": 4,
            "num_conv_pos_embeddings": 16,
        }  # fmt: skip
    if name.startswith("wav2vec2"):
        config = transformers.Wav2Vec2Config(vocab_size=32, **quiet)
        config._attn_implementation = "sdpa"
        return transformers.Wav2Vec2ForCTC(config)
    settings = {
        "hidden_size": 512, "num_hidden_layers": 17, "num_attention_heads": 8,
        "intermediate_size": 2048, "conv_depthwise_kernel_size": 31,
        "position_embeddings_type": "rotary", "vocab_size": 1024,
        "conv_dim": (512,) * 8, "conv_kernel": (10, 3, 3, 3, 3, 2, 2, 2),
        "conv_stride": (5, 2, 2, 2, 2, 2, 2, 2),
    }  # fmt: skip
    settings |= quiet
    settings["conv_dim"] = settings["conv_dim"][:1] * 8
    return transformers.Wav2Vec2ConformerForCTC(transformers.Wav2Vec2ConformerConfig(**settings))


def _measure(table, flags, what, model, rows, seconds, name, compiled) -> None:
    import torch

    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    audio = torch.randn(rows, round(seconds * RATE), device=device)
    count = round(seconds * SIZES[name][1])
    labels = torch.randint(1, model.config.vocab_size, (rows, count), device=device)
    mask = torch.ones_like(audio, dtype=torch.long)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01, fused=cuda)
    forward = torch.compile(model) if compiled else model

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(audio, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loss = step()
    first = time.perf_counter() - start
    step()
    with alone(flags.work):
        took = median_seconds(step, 2 if flags.tiny else 8, warmup=1)
    table.add(
        what,
        ms=1e3 * took,
        audio_s_per_s=rows * seconds / took,
        first_call_s=first,
        peak_GiB=torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        M_parameters=sum(x.numel() for x in parameters) / 1e6,
        loss=loss,
    )


if __name__ == "__main__":
    run_part("peer", run)
