"""Draws a run's training curve: loss per label and error rates against updates.

python -m benchmarks.curve runs/librispeech benchmarks/curves/librispeech.png
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot


def main(workdir: str, picture: str) -> None:
    """Reads metrics.jsonl in `workdir`, writes `picture`."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    figure, loss_axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    losses = [
        (point["step"], point["loss_per_label"]) for point in points if "loss_per_label" in point
    ]
    loss_axis.plot(*zip(*losses, strict=True), color="tab:blue", label="training loss")
    loss_axis.set(xlabel="update", ylabel="loss (nats per label)", ylim=(0, None))
    rate_axis = loss_axis.twinx()
    names = sorted({name for point in points for name in point if "/" in name})
    for name, color in zip(
        names, ("tab:orange", "tab:red", "tab:green", "tab:purple"), strict=False
    ):
        rates = [(point["step"], 100 * point[name]) for point in points if name in point]
        split, kind = name.split("/")
        rate_axis.plot(
            *zip(*rates, strict=True), "o-", color=color, label=f"{kind.upper()}, {split}"
        )
    rate_axis.set(ylabel="error rate (%)", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=1 + len(names))
    pathlib.Path(picture).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
