"""Robustness curves of several runs: one plot, one table.

  python -m speech_jax.main --mode=robustness --config=... --workdir=runs/clean ...
  python -m speech_jax.main --mode=robustness --config=... --workdir=runs/robust ...
  python -m benchmarks.robustness clean=runs/clean robust=runs/robust --plot robustness.png

A row is a perturbation, with the word error rate of every run (of recognizers) under it in per
cent. Where a second run is compared with the first, `threshold` is the smallest epsilon at which
PGD-10 takes the first above 50%.
"""

import argparse
import json
import pathlib

from benchmarks.table import report
from speech_jax.evaluators.robustness import plot


def main():
    """Reads the runs' robustness.json; prints the table and draws the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR")
    parser.add_argument("--plot", help="where to draw the curves")
    parser.add_argument("--json", help="also write the table here")
    flags = parser.parse_args()
    runs = {}
    for run in flags.runs:
        name, _, workdir = run.rpartition("=")
        path = pathlib.Path(workdir) / "robustness.json"
        if not path.exists():
            parser.error(f"{path} does not exist: run --mode=robustness for {workdir} first")
        runs[name or pathlib.Path(workdir).name] = json.loads(path.read_text())
    report(list(_rows(runs)), file=flags.json)
    if flags.plot:
        plot(runs, flags.plot)


def _rows(runs):
    first = next(iter(runs.values()))
    for split, curves in first.items():
        over = [point["epsilon"] for point in curves["pgd10"] if point["wer"] > 0.5]
        for curve, points in curves.items():
            for place, point in enumerate([points] if curve == "clean" else points):
                level = point.get("epsilon", point.get("snr_db"))
                found = {
                    name: 100 * _point(other[split][curve], place, level)["wer"]
                    for name, other in runs.items()
                }
                threshold = curve == "pgd10" and over and level == min(over)
                note = "threshold" if threshold else ""
                yield {"split": split, "curve": curve, "level": level, **found, "note": note}


def _point(points, place, level):
    point = points if isinstance(points, dict) else points[place]
    if point.get("epsilon", point.get("snr_db")) != level:
        raise SystemExit("the runs were measured at different levels: measure them alike")
    return point


if __name__ == "__main__":
    main()
