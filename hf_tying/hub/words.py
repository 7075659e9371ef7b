"""Numbers and names as a card has them: nothing that a name from a file contains may act as markup."""

from ..report.names import printable, printable_text, shortened


def code(name: str) -> str:
    """A name from a file as code in a table of Markdown."""
    plain = printable(name).replace("`", "'").replace("|", "\\|").replace("<!--", "<!")
    return f"`{shortened(plain, 120)}`"


def plain(name: object) -> str:
    """Text from a file in a table of Markdown, without markup."""
    text = printable_text(str(name))
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)


def number(value: object) -> str:
    """A measured number; nothing for one that is missing."""
    if not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"


def megabytes(count: float) -> str:
    """A number of bytes, with the unit that the Hub shows."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count:,.0f} B"


def percent(share: float) -> str:
    """A share from 0 to 1."""
    return f"{100 * share:.0f} %"


def change(now: float, before: float) -> str:
    """How much less `now` is than `before`."""
    return f"{100 * (now - before) / before:+.0f} %" if before and now != before else "the same"
