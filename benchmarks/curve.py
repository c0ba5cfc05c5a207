"""Draws a run's curves against updates: a panel for each metric, in training and on each split.

python -m benchmarks.curve runs/librispeech librispeech.png loss_per_label cer wer
python -m benchmarks.curve runs/wav2vec2 wav2vec2.png loss_per_frame accuracy code_perplexity
"""

import json
import pathlib
import sys

from matplotlib.figure import Figure


def main(workdir: str, picture: str, *metrics: str) -> None:
    """Reads metrics.jsonl in `workdir`, writes `picture`."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    figure = Figure(figsize=(4.2 * len(metrics), 3.6), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    splits = ["", *sorted({name.rpartition("/")[0] for point in points for name in point} - {""})]
    for panel, metric in zip(panels, metrics, strict=True):
        names = {name for point in points for name in point if name.split("/")[-1] == metric}
        if not names:
            sys.exit(f"error: no {metric} in {workdir}/metrics.jsonl")
        for name in sorted(names):
            curve = [(point["step"], point[name]) for point in points if name in point]
            split = name.rpartition("/")[0]
            style = {"color": f"C{splits.index(split)}", "marker": "o" if split else ""}
            panel.plot(*zip(*curve, strict=True), label=split or "training", **style)
        panel.set(xlabel="update", ylabel=metric.replace("_", " "), ylim=(0, None))
        panel.legend()
    pathlib.Path(picture).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
