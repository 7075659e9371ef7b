"""The text of a card: sections of this package between markers, and the rest, which is somebody else's and stays.

    <!-- hf_tying:ties --> ... <!-- /hf_tying:ties -->

A section is renewed where it stands. A new one comes after the one before it. One with nothing to say any more goes.
The templates of other libraries leave sections that nobody has filled in; those go too, and what was filled in stays.
"""

import re

_SECTION = re.compile(r"<!-- hf_tying:(\w+) -->.*?<!-- /hf_tying:\1 -->\n*", re.DOTALL)
_HEADING = re.compile(r"^(#{1,6}) +(.*?)\s*$")
#: A name of something, and nothing after it.
_LABEL = re.compile(r"\s*(?:[-*] *)?\*\*[^*]*\*\*:?\s*")
#: Lines of templates that say nothing: of transformers, its Trainer, PEFT and TRL.
_EMPTY_LINE = re.compile(
    r"""\s*(
        (?:[-*]\s*)?(?:\*\*[^*]*\*\*:?\s*)?\[?More\ information\ needed\]?(?:\ for\ further\ recommendations\.)?
        | Use\ the\ code\ below\ to\ get\ started\ with\ the\ model\.
        | Users\ \(both\ direct\ and\ downstream\)\ should\ be\ made\ aware\ of\ the\ risks.*
        | Carbon\ emissions\ can\ be\ estimated\ using.*
        | This\ is\ the\ model\ card\ of\ a\ .*automatically\ generated\.
        | This\ model\ is\ a\ fine-tuned\ version\ of\ \[(?:None)?\]\(https://huggingface\.co/(?:None)?\)\.?.*
        | This\ model\ was\ trained\ from\ scratch\ on\ an\ unknown\ dataset\.
        | This\ modelcard\ aims\ to\ be\ a\ base\ template.*
        | should\ probably\ proofread\ and\ complete\ it.*
    )\s*""",
    re.VERBOSE | re.IGNORECASE,
)
_TITLES = ("Model Card for Model ID", "Model Card for None")


def sections_of(text: str) -> dict[str, str]:
    """The sections of this package in a text, with their markers, by name."""
    return {match[1]: match[0].rstrip("\n") for match in _SECTION.finditer(text)}


def merge_sections(before: str, made: str, title: str) -> str:
    """Put the sections of a new text into an older one.

    Args:
        before: text of the card that is there; empty for none.
        made: text that a template made, with all its sections in their order.
        title: heading of a card that has none, or a placeholder for one.

    Returns:
        The text of the card.
    """
    new, text = sections_of(made), without_placeholders(before, title)
    for name in sections_of(text).keys() - new.keys():
        text = re.sub(rf"<!-- hf_tying:{name} -->.*?<!-- /hf_tying:{name} -->\n*", "", text, flags=re.DOTALL)
    previous = None
    for name, section in new.items():
        held = sections_of(text).get(name)
        if held is not None:
            text = text.replace(held, section)
        elif previous is not None:
            text = text.replace(previous, f"{previous}\n\n{section}")
        else:
            heading = re.search(r"^# .*$", text, re.MULTILINE)
            place = heading.end() if heading else 0
            text = f"{text[:place].rstrip()}\n\n{section}\n\n{text[place:].lstrip()}"
        previous = section
    return f"{text.strip()}\n"


def without_placeholders(text: str, title: str) -> str:
    """A text without the headings under which a template has left nothing but a placeholder.

    A text without placeholders is somebody's own, and stays as it is, whatever it has.

    Args:
        text: text of a card.
        title: heading in place of a missing one or a placeholder.
    """
    if not text.strip():
        return f"# {title}\n"
    if not any(_EMPTY_LINE.fullmatch(line) for line in text.splitlines()):
        return text
    kept: list[str] = []
    below = 0  # depth of the highest heading that is kept below
    for depth, lines in reversed(_blocks(text)):
        bare = _without_comments(lines)
        body = [line for line in bare if not _EMPTY_LINE.fullmatch(line)]
        said = any(line.strip() and not _LABEL.fullmatch(line) for line in body[1:] if depth) or not depth
        if said or depth == 1 or (below > depth and len(body) == len(bare)):
            kept = body + kept
            below = depth or below
    result = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).replace(" on an unknown dataset.", ".").strip()
    first = re.search(r"^# +(.*?)\s*$", result, re.MULTILINE)
    if first is None:
        return f"# {title}\n\n{result}"
    if first[1] in _TITLES:
        return result[: first.start()] + f"# {title}" + result[first.end() :]
    return result


def _blocks(text: str) -> list[tuple[int, list[str]]]:
    """The text cut before each heading: how deep it is (0 before the first one), and its lines with the heading."""
    blocks: list[tuple[int, list[str]]] = [(0, [])]
    fenced = False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if not fenced and (match := _HEADING.match(line)):
            blocks.append((len(match[1]), []))
        blocks[-1][1].append(line)
    return blocks


def _without_comments(lines: list[str]) -> list[str]:
    """Lines without the comments that a template gives to its authors. The markers of this package stay."""
    return re.sub(r"<!--(?! /?hf_tying:| run).*?-->", "", "\n".join(lines), flags=re.DOTALL).split("\n")
