"""The letters with which pictures are labelled.

Pillow's own font has no umlaut, no accent and no other script. MLflow brings matplotlib along, and that the font DejaVu Sans: Latin, Greek,
Cyrillic and more. Nothing of matplotlib is imported.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import ImageFont


@cache
def font(size: int) -> Any:
    """A font of Pillow, of so many pixels."""
    package = find_spec("matplotlib")
    for place in (package.submodule_search_locations or ()) if package is not None else ():
        file = Path(place) / "mpl-data/fonts/ttf/DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), size)
    return ImageFont.load_default(size)
