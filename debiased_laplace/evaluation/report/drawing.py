"""What all figures share: colours, markers and dashes, legends, and image files without a display.

Colours are safe for colour-blind readers; markers and dashes tell lines apart in grey. Figures are made with
Matplotlib's object interface on the Agg canvas: no global state, no display.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

#: Okabe and Ito's colours, darkest first, each with another marker and dash pattern.
STYLES: tuple[tuple[str, str, Any], ...] = (
    ("#000000", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#0072B2", "^", "-"),
    ("#009E73", "D", ":"),
    ("#CC79A7", "v", "-."),
    ("#56B4E9", "P", (0, (5, 1, 1, 1, 1, 1))),
    ("#E69F00", "X", (0, (1, 2))),
    ("#8B4513", "<", (0, (7, 2))),
    ("#666666", ">", (0, (3, 1, 1, 1))),
    ("#4B0082", "*", (0, (2, 1))),
    ("#999933", "h", (0, (9, 1))),
    ("#882255", "p", (0, (4, 1, 1, 1))),
    ("#117733", "d", (0, (1, 1, 3, 1))),
    ("#AA4499", "H", (0, (6, 3))),
)


@dataclass(frozen=True)
class Picture:
    """A figure for the report.

    Attributes:
        title: Short.
        caption: How to read it.
        alternative: What a reader who cannot see it should know.
        png: The image.
        wide: Whether it is too wide for a telephone, and is to be scrolled there.
    """

    title: str
    caption: str
    alternative: str
    png: bytes
    wide: bool = False


def finite(values: Sequence[float]) -> Any:
    """An array with NaN, which is not drawn, for all that is not finite."""
    array = np.asarray(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)


def legend(figure: Figure, styles: Mapping[str, tuple[str, str, Any]]) -> None:
    """Names with their colours, markers and dashes, below the panels."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, marker=marker or None, linestyle=dashes, markersize=5, label=name)
        for name, (color, marker, dashes) in styles.items()
    ]
    width = figure.get_figwidth()
    figure.legend(
        handles=handles, loc="outside lower center", ncols=max(1, int(width // 2.2)), fontsize=9, frameon=False
    )


def png(figure: Figure) -> bytes:
    """The bytes of an image file; drawn once, where ``savefig`` draws twice."""
    figure.set(dpi=120, facecolor="white")
    _show_as_it_is(figure)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


def tiled(images: Sequence[bytes], columns: int) -> bytes:
    """Image files of one size side by side, row after row, on white."""
    from PIL import Image

    tiles = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
    (width, height), columns = tiles[0].size, min(columns, len(tiles))
    whole = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for index, tile in enumerate(tiles):
        whole.paste(tile, (index % columns * width, index // columns * height))
    file = io.BytesIO()
    whole.save(file, "PNG")
    return file.getvalue()


def _show_as_it_is(figure: Figure) -> None:
    """A dollar in a name is no formula; the labels of ticks are, and are not made before they are drawn."""
    waiting: list[Artist] = [figure]
    while waiting:
        artist = waiting.pop()
        if isinstance(artist, Text):
            artist.set_parse_math(False)  # type: ignore[attr-defined]
        waiting += [artist.label, artist.offsetText] if isinstance(artist, Axis) else artist.get_children()
