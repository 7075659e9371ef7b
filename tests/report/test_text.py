"""The text of a report: 80 columns, whole words, a row for each module group, nothing that a terminal would obey."""

import re
from dataclasses import replace

import pytest
from torch import nn

from hf_tying import tie, tying_report
from hf_tying.report.names import patterns, printable, shortened, wrapped

from ..tiny import tiny_model
from .helpers import MODELS, broken, every_form, shared_layers, tied


def rows_of(text: str) -> list[list[str]]:
    """The cells of the table, without the lines of a cell below its first."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if set(line) == {"─"}) + 1
    table = lines[first : lines.index("", first)]
    return [re.split(r"\s{3,}|\s{2}", line.strip()) for line in table if not line.startswith(" ")]


def names_in(text: str) -> set[str]:
    """Every name that a text shows, with the patterns written out."""
    found = set()
    for word in text.split():
        pieces = re.split(r"\{([^}]*)\}", word)
        names = [pieces[0]]
        for inside, after in zip(pieces[1::2], pieces[2::2], strict=True):
            values = [v for part in inside.split(",") for v in _values(part)]
            names = [name + value + after for name in names for value in values]
        found.update(names)
    return found


def _values(part: str) -> list[str]:
    run = re.fullmatch(r"(\d+)-(\d+)", part)
    return [str(i) for i in range(int(run[1]), int(run[2]) + 1)] if run else [part]


@pytest.mark.parametrize("width", [80, 120, 200])
@every_form
def test_no_line_is_wider_than_asked_and_no_word_is_broken(form, width):
    report = tying_report(MODELS[form]())
    text = report.to_table(width)
    assert max(map(len, text.splitlines())) <= width
    words = set(re.split(r"\s+", text))
    for group in report.groups:
        assert f"{group.shape[0]:,}" in words or "shapes" in words
        assert group.dtype in words
    whole = {word for wide in (report.to_table(1000),) for word in re.split(r"\s+", wide)} - {""}
    assert {word for word in words if "─" not in word} - {""} == {word for word in whole if "─" not in word}


@pytest.mark.parametrize("form", [form for form in MODELS if form != "Tied-LoRA"])  # of 40 sets some are counted only
def test_every_tied_name_is_shown_by_itself_or_by_a_pattern(form):
    report = tying_report(MODELS[form]())
    shown = names_in(report.to_table())
    for group in report.groups:
        places = [name for name in group.names if name not in shown]
        assert all(any(name.startswith(f"{place}.") for place in shown) for name in places)


def test_an_untied_model_says_so():
    assert "parameters, scheme none\nnothing is tied" in tying_report(MODELS["untied"]()).to_table()


def test_the_heading_names_no_scheme_where_other_groups_are_tied():
    module = tie(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0", "1"], init_from="mean")
    assert tying_report(module).to_table().startswith("Sequential: 20 parameters\n")
    assert tying_report(MODELS["gpt2"]()).to_table().splitlines()[0].endswith(", scheme two_way")


@pytest.mark.parametrize(
    "layers, size, count",
    [(12, 12, "9 x 12"), (12, 2, "6 x 9 x 2"), (12, 4, "3 x 9 x 4"), (40, 40, "9 x 40")],
)
def test_layers_that_are_one_have_one_row_with_their_count(layers, size, count):
    report = tying_report(shared_layers(layers, size))
    rows = rows_of(report.to_table())
    assert len(rows) == 2 and len(report.groups) == 9 * layers // size + 1
    assert rows[0][1] == count and rows[1][:2] == ["embeddings", "2"]
    saved = sum(group.parameters_saved for group in report.groups if group.name != "embeddings")
    assert rows[0][-1] == f"{saved:,}"


def test_sets_of_layers_are_listed_one_in_a_line():
    text = tying_report(shared_layers(6, 2)).to_table()
    assert [line.strip() for line in text.splitlines() if line.startswith("  model.layers")] == [
        "model.layers.{0,1}",
        "model.layers.{2,3}",
        "model.layers.{4,5}",
    ]


def test_factors_of_adapters_have_a_row_for_each_and_one_for_all_layers_of_u():
    rows = rows_of(tying_report(MODELS["Tied-LoRA"]()).to_table())
    assert [row[0].partition(" ")[2][:1] for row in rows] == ["A", "B", "u", "B", "B"]
    assert [row[1] for row in rows] == ["120", "40", "40 x 3", "40", "40"]


def test_what_is_broken_has_a_row_of_its_own_in_a_set_of_layers():
    model = shared_layers(4, 2)
    model.model.layers[3].mlp.up_proj.weight = type(model.lm_head.weight)(model.lm_head.weight.new_zeros(32, 16))
    rows = rows_of(tying_report(model).to_table())
    assert [row[1] for row in rows if "BROKEN" in row] == ["2"]
    assert len(rows) == 4  # a set, the rest of the other set, what is broken of it, the embeddings


@pytest.mark.parametrize("color", [True, False])
def test_a_broken_tie_is_red_where_colours_are_asked_for(color):
    text = tying_report(broken("bart")).to_table(color=color)
    red = re.findall(r"\x1b\[1;31m([^\x1b]*)", text)
    assert any("BROKEN" in part for part in red) == color
    assert any("lm_head.weight" in part for part in red) == color
    assert ("\x1b" in text) == color and "BROKEN" in text
    assert "\x1b[1;31m" not in tying_report(tied("bart")).to_table(color=True)


@pytest.mark.parametrize(
    "name", ["[bold]x[/bold]", "[/b]", "x\x1b[2Jy", "x\ny", "x\r\x07y", "‮evil", "\ud800", "a\u2028b", "長い名前" * 30]
)
def test_names_of_a_file_are_printed_and_not_obeyed(name):
    report = tying_report(tied("bart"))
    (group,) = report.groups
    hostile = replace(group, name=name, names=[name, f"{name}.weight"], roles={name: "target"}, dtype=name)
    report = replace(report, groups=[hostile], architecture=name, source=f"/tmp/{name}")
    text = report.to_table()
    assert all(line.isprintable() for line in text.splitlines())
    from rich.cells import cell_len

    assert max(map(cell_len, text.splitlines())) <= 80
    assert printable(name)[:8] in text.replace("\n", "").replace(" ", "")


def test_thousands_of_groups_are_counted_and_not_all_shown():
    report = tying_report(tied("gpt2"))
    (group,) = report.groups
    groups = [
        replace(group, name=f"g{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{'z' * (i // 676)}") for i in range(2000)
    ]
    text = replace(report, groups=groups).to_table()
    assert len(text.splitlines()) < 500 and "1,940 more groups" in text


def test_a_model_with_its_own_tie_of_layers_needs_no_rows_for_them():
    assert [row[0] for row in rows_of(tying_report(tiny_model("albert")).to_table())] == ["embeddings", "bias"]


def test_patterns_write_many_names_as_one():
    names = [f"h.{i}.{m}" for i in (0, 1, 2, 5) for m in ("q", "k")]
    assert patterns(names) == ["h.{0-2,5}.{q,k}"]
    assert patterns(["a.b", "a", "c.d.e"]) == ["a.b", "a", "c.d.e"]
    assert patterns(["h.0.q", "h.1.q", "h.1.k"]) == ["h.0.q", "h.1.{q,k}"]
    assert patterns(["a.²", "a.1"]) == ["a.{²,1}"]
    assert names_in(patterns(names)[0]) == set(names)


def test_lines_are_broken_between_words_and_in_names_behind_a_dot():
    assert wrapped("one two three", 8, 2) == ["one two", "  three"]
    assert wrapped("model.language_model.weight", 16) == ["model.language_", "model.weight"]
    assert wrapped("x" * 25, 10, 1) == ["x" * 10, " " + "x" * 9, " " + "x" * 6]
    assert wrapped("", 10) == [""]
    assert shortened("abcdefghij", 7) == "ab..." + "ij" and shortened("abc", 7) == "abc"
