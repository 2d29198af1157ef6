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


def _show_as_it_is(figure: Figure) -> None:
    """A dollar in a name is no formula; the labels of ticks are."""
    ticks = {
        id(label) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()) for label in (tick.label1, tick.label2)
    }  # fmt: skip
    for text in figure.findobj(Text):
        if id(text) not in ticks:
            text.set_parse_math(False)  # type: ignore[attr-defined]
