"""A manifest whose recordings have changed places: what a model learns of it is of texts alone.

  python -m benchmarks.shuffled Mboshi/train.jsonl Mboshi/dev.jsonl --out shuffled
  python -m speech_jax.main --config=configs/mboshi.py --config.data.root=shuffled \\
      --workdir=runs/shuffled

A translator that listens is better than the same run on this by far.
"""

import argparse
import json
import pathlib
import random

_OF_AUDIO = ("audio_filepath", "offset", "duration")


def shuffle(manifest: pathlib.Path, seed: int) -> list[dict]:
    """The lines of a manifest with the audio of other lines, whose paths are absolute."""
    rows = [json.loads(line) for line in manifest.read_text("utf-8").splitlines() if line.strip()]
    audio = [{key: row.pop(key) for key in _OF_AUDIO if key in row} for row in rows]
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    moved = dict(zip(order, order[1:] + order[:1], strict=True))  # none stays where it was
    for place, row in enumerate(rows):
        row |= audio[moved[place]]
        row["audio_filepath"] = str(manifest.parent.resolve() / row["audio_filepath"])
        row["id"] = str(place)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifests", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path, help="the folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    for manifest in chosen.manifests:
        rows = shuffle(manifest, chosen.seed)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (chosen.out / manifest.name).write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main()
