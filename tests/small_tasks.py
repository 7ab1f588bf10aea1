"""Small files of tasks, in the layouts of their authors."""

from __future__ import annotations

import json
from pathlib import Path

COLORS = """Index,Descriptor,Item,Color
1,a ,sunflower,yellow
2,the ,ocean,blue
3,,grass,green
4,the ,garden,green
"""


THINGS = ("sunflower", "ocean", "grass", "garden")


def write(directory: Path) -> Path:
    """Colours of four things, and three pairs of heights."""
    directory.mkdir(parents=True)
    (directory / "memory_color_data.csv").write_text(COLORS)
    heights = [("a tree", "an ant", 1), ("an ant", "a house", 0), ("a tree", "a mouse", 1)]
    lines = [json.dumps({"obj_a": a, "obj_b": b, "label": label}) for a, b, label in heights]
    (directory / "tnwit_height.json").write_text("\n".join(lines))
    return directory
