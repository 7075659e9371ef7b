"""What all pictures of the package have in common: colours that colour-blind readers tell apart, points, axes, text.

Source: Okabe and Ito 2008, "Color Universal Design"; viridis of matplotlib, where more colours are needed.
"""

from collections.abc import Iterable
from math import gcd
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axis import Axis

#: Blue, orange, green, pink, sky, yellow.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#f0e442")
#: Vermilion: what is broken, and nothing else.
BROKEN = "#d55e00"
#: What no tie group holds.
OTHER = "#bbbbbb"
#: A matrix of several roles.
TIED = "#0072b2"
#: The same role has the same colour in all pictures.
ROLES = {"source": "#cc79a7", "target": "#56b4e9", "output": "#4d4d4d"}

#: Lines of a comparison, the untied model first: none of them is the colour of a role.
RUNS = ("#e69f00", "#009e73", "#0072b2")

# Longer curves are lines without points.
_FEW = 12


def distinct_colors(count: int) -> list[str]:
    """As many different colours as are asked for, each far from the one before it."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    # Evenly over the map, in strides that share no divisor with `count`, so that each place is taken once.
    stride = next(n for n in range(round(0.618 * count), count + 1) if gcd(n, count) == 1)
    return [to_hex(colormaps["viridis"](i * stride % count / (count - 1))) for i in range(count)]


def color_of_role(role: str) -> str:
    """The colour of a role; grey for another word."""
    return ROLES.get(role, OTHER)


def plain(text: str) -> str:
    """Escape what matplotlib would take for a formula."""
    return text.replace("$", r"\$")


def points_of(count: int) -> dict[str, Any]:
    """How the points of a curve are drawn, as keywords of `plot`: a line through a single point would not be seen.

    Args:
        count: how many points the curve has.
    """
    return {"marker": "o", "markersize": 6 if count == 1 else 4} if count <= _FEW else {}


def number_by_steps(axis: "Axis", steps: Iterable[int]) -> None:
    """Number an axis by the steps of its curves, which have no halves."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    known = sorted(set(steps))
    axis.set_major_locator(FixedLocator(known) if len(known) < 6 else MaxNLocator(integer=True, nbins=6))
