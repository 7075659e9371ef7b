"""The picture of a report, by what is drawn in it: colours, cells, labels, bars."""

import os
import warnings

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hf_tying import tying_report
from hf_tying.report.drawing import BROKEN, PALETTE, distinct_colors
from hf_tying.report.picture import cells_of

from ..processes import run_python
from .helpers import MODELS, every_form, shared_layers

pytestmark = pytest.mark.slow  # figures are laid out


def drawn(report) -> Figure:
    figure = Figure(layout="constrained")
    report._draw(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that cannot be made is a warning
        figure.draw_without_rendering()
    return figure


def colors_by_number(figure: Figure) -> dict[int, set[str]]:
    """The colour of each cell of the grids, by the number that is written in it."""
    found: dict[int, set[str]] = {}
    for axes in figure.axes[:-1]:
        cells = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        for text in axes.texts:
            x, y = text.get_position()
            (cell,) = (c for c in cells if abs(c.get_x() + 0.46 - x) < 0.1 and abs(c.get_y() + 0.42 - y) < 0.1)
            if not cell.get_hatch():
                found.setdefault(int(text.get_text()), set()).add(to_hex(cell.get_facecolor()))
    return found


@every_form
def test_a_shared_parameter_has_one_colour_in_all_panels_and_no_other_has_it(form):
    report = tying_report(MODELS[form]())
    figure = drawn(report)
    by_number = colors_by_number(figure)
    assert sorted(by_number) == list(range(1, len(report.groups) + 1))
    assert all(len(colors) == 1 for colors in by_number.values())
    colors = [color for number in sorted(by_number) for color in by_number[number]]
    assert len(set(colors)) == len(report.groups) and BROKEN not in colors
    solid = {to_hex(bar.get_facecolor()) for bar in figure.axes[-1].patches if not bar.get_hatch() and bar.get_width()}
    assert set(colors) <= solid


@every_form
def test_every_tied_name_has_its_cell(form):
    report = tying_report(MODELS[form]())
    cells = [cell for i, group in enumerate(report.groups) for cell in cells_of(group, i)]
    assert len(cells) == len(set(cells)) == sum(len(group.names) for group in report.groups)
    figure = drawn(report)
    assert sum(len(axes.patches) for axes in figure.axes[:-1]) == len(cells)


@every_form
def test_the_bars_are_as_long_as_what_is_held_and_saved(form):
    report = tying_report(MODELS[form]())
    bars = drawn(report).axes[-1].patches
    held = sum(bar.get_width() for bar in bars if bar.get_hatch() != "////")
    saved = sum(bar.get_width() for bar in bars if bar.get_hatch() == "////")
    assert saved == report.to_dict()["parameters_saved"]
    adapters = any(group.part for group in report.groups)
    assert held == report.parameters or adapters


@every_form
def test_no_label_lies_over_another(form):
    figure = drawn(tying_report(MODELS[form]()))
    renderer = FigureCanvasAgg(figure).get_renderer()
    width, height = figure.get_size_inches() * figure.dpi
    labels = [text for axes in figure.axes for text in (*axes.get_yticklabels(), axes.xaxis.label, axes.title)]
    labels += [axes._left_title for axes in figure.axes] + [figure._suptitle]
    boxes = [text.get_window_extent(renderer) for text in labels if text.get_text()]
    assert all(box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1 for box in boxes)
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


@every_form
def test_axes_have_labels(form):
    *grids, bars = drawn(tying_report(MODELS[form]())).axes
    assert bars.get_xlabel() == "number of parameters"
    for axes in grids:
        assert all(label.get_text() for label in axes.get_yticklabels())
        assert axes.get_xlabel().startswith("layer of") or not axes.get_xticks().size


def test_the_grid_is_layer_by_module():
    figure = drawn(tying_report(shared_layers(6, 2)))
    names, grid, bars = figure.axes
    assert [label.get_text() for label in names.get_yticklabels()] == [
        "model.embed_tokens.weight (target)",
        "lm_head.weight (output)",
    ]
    assert grid.get_xlabel() == "layer of model.layers" and len(grid.get_xticks()) == 6
    assert [label.get_text() for label in grid.get_yticklabels()][:2] == [
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
    ]
    assert [label.get_text() for label in bars.get_yticklabels()] == [
        "1-27  set_0 ...",
        "28  embeddings",
        "all other parameters",
    ]


def test_a_broken_tie_is_red_in_the_grid_in_the_bars_and_in_the_label():
    figure = drawn(tying_report(MODELS["broken"]()))
    grid, bars = figure.axes
    (cell,) = (patch for patch in grid.patches if patch.get_hatch())
    assert to_hex(cell.get_edgecolor()) == BROKEN and cell.get_y() == pytest.approx(3 - 0.42)
    assert [bar.get_width() for bar in bars.patches if to_hex(bar.get_edgecolor()) == BROKEN] == [64 * 16]
    label = bars.get_yticklabels()[0]
    assert label.get_text().startswith("BROKEN") and to_hex(label.get_color()) == BROKEN
    assert "broken tie" in [text.get_text() for text in bars.get_legend().get_texts()]


def test_the_factors_of_an_adapter_are_seen_beside_a_whole_model():
    bars = drawn(tying_report(MODELS["Tied-LoRA"]())).axes[-1]
    assert bars.get_xlim()[1] < 20_000 and bars.texts[0].get_text() == "107,664, beyond the axis"


@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 8, 54, 200])
def test_colours_are_different_and_none_is_that_of_what_is_broken(count):
    colors = distinct_colors(count)
    assert len(colors) == len(set(colors)) == count and BROKEN not in colors
    assert count > 6 or colors == list(PALETTE[:count])


def test_names_of_a_file_are_no_formulas(tmp_path):
    from dataclasses import replace

    report = tying_report(MODELS["gpt2"]())
    (group,) = report.groups
    name = r"$\frac$ \x $ " + "x" * 300
    hostile = replace(group, name=name, names=[name, f"{name}.0.{name}"], roles={})
    replace(report, groups=[hostile] * 60, architecture=name).plot(tmp_path / "hostile.svg")
    assert (tmp_path / "hostile.svg").stat().st_size > 1000


def test_a_picture_needs_no_display_and_leaves_the_backend_alone(tmp_path):
    code = (
        "import sys, matplotlib\n"
        "matplotlib.use('svg')\n"
        "from tests.report.helpers import tied\nfrom hf_tying import tying_report\n"
        f"tying_report(tied('gpt2')).plot({str(tmp_path / 'ties.png')!r})\n"
        "assert matplotlib.get_backend() == 'svg' and 'matplotlib.pyplot' not in sys.modules"
    )
    run_python("-c", code, environment={"DISPLAY": None, "PYTHONPATH": os.environ.get("PYTHONPATH")})
    assert (tmp_path / "ties.png").stat().st_size > 1000
