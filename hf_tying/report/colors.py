"""The colours of all pictures of the package. Readers who see few colours can tell them apart.

Source: Okabe and Ito 2008, "Color Universal Design"; viridis of matplotlib, where more colours are needed.
"""

#: Blue, orange, green, pink, sky, yellow.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#f0e442")
#: Vermilion: what is broken, and nothing else.
BROKEN = "#d55e00"
#: What no tie group holds.
OTHER = "#bbbbbb"
#: The same role has the same colour in all pictures. They are not those of the first runs in a comparison.
ROLES = {"source": "#cc79a7", "target": "#56b4e9", "output": "#009e73"}

_GOLDEN = 0.6180339887


def distinct_colors(count: int) -> list[str]:
    """As many different colours as are asked for, each far from the one before it."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    viridis = colormaps["viridis"]
    return [to_hex(viridis(_GOLDEN * i % 1)) for i in range(count)]


def color_of_role(role: str) -> str:
    """The colour of a role; grey for another word."""
    return ROLES.get(role, OTHER)
