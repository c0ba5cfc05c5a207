"""A stand-in until the parts land: a class by its place in a list of names."""

import dataclasses
import json
import pathlib


@dataclasses.dataclass(frozen=True)
class Category:
    classes: tuple[str, ...]
    name: str = "target"
    tag: str = "label"

    def save(self, folder: pathlib.Path) -> None:
        (folder / f"{self.name}.json").write_text(json.dumps(self.classes), "utf-8")

    @classmethod
    def restore(cls, folder: pathlib.Path) -> "Category":
        return cls(tuple(json.loads((folder / "target.json").read_text("utf-8"))))
