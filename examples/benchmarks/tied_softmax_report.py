"""The tables and the picture of `tied_softmax.py`, from what it writes as JSON."""

from pathlib import Path

from rich.table import Table

NOT_KNOWN = "-"


def tables(report: dict) -> list[Table]:
    """Results, and what the project has set itself beside them."""
    made = report["machine"]
    native = "with" if made["cpu_has_bfloat16"] else "without"
    place = f"{made['cpu']}, {made['cpu_capability']}, {native} bfloat16, {made['threads']} threads"
    if made["device"] != "cpu":
        place = made["device"]
    results = Table(title=f"Forward and backward; torch {made['torch']}; {place}")
    columns = ["", "median", "of CPU", "to naive", "to floor", "peak", "to naive", "V x D", "error of dW", "to naive"]
    for column in [*columns, "loss off by", "steps"]:
        results.add_column(column, justify="right" if column else "left", no_wrap=not column)
    problem = None
    for row in report["rows"]:
        if row["problem"] != problem:
            problem = row["problem"]
            results.add_section()
            results.add_row(problem, style="bold")
        results.add_row(f"  {row['method']}", *_cells(row))
    found = [results]
    goals = Table(title="Goals for tied, as ratios to naive")
    columns = ["", "time", "must be", "", "goal", "", "peak", "goal", "", "time to floor", "floor to naive"]
    for number, column in enumerate(columns):
        goals.add_column(column, justify="right" if number else "left")
    for row in report["rows"]:
        if "goals" in row:
            (must, met), (aim, reached), (peak, kept) = row["goals"].values()
            cells = [_time_ratio(row), f"{must:.2f}", met, f"{aim:.2f}", reached, _number(row["peak_ratio"], ".3f")]
            below = next(own for own in report["rows"] if (own["problem"], own["method"]) == (row["problem"], "floor"))
            cells += [f"{peak:.2f}", kept, _number(row["to_floor"], ".2f"), _time_ratio(below)]
            goals.add_row(row["problem"], *cells)
    return found + [goals] * bool(goals.rows)


def notes(report: dict) -> list[str]:
    """Why there are no figures, each reason once; the peaks of models without their optimiser's part."""
    reasons = {}
    for row in report["rows"]:
        if row["failed"]:
            reasons.setdefault((row["method"], row["failed"]), []).append(row["problem"])
    every = len({row["problem"] for row in report["rows"]})
    lines = [
        f"{method} does not run here{'' if len(at) == every else ' (' + '; '.join(at) + ')'}: {reason}"
        for (method, reason), at in reasons.items()
    ]
    for row in report["rows"]:
        if row["model_peak_ratio"] is not None and row["method"] != "naive":
            size = f"{row['model_peak_bytes'] / 2**20:,.1f} MiB, {row['model_peak_ratio']:.3f} of naive's"
            lines.append(f"{row['problem']}: without the step of the optimiser the peak of {row['method']} is {size}")
    return lines


def _cells(row: dict) -> list[str]:
    if row["failed"] and not row["median_seconds"]:
        return ["does not run"]
    steps = f"{row['steps']}" if row["steps"] else "the first alone"
    median = NOT_KNOWN
    if row["median_seconds"]:
        median = f"{row['median_seconds'] * 1e3:,.1f} ms"
    elif row["at_least_seconds"]:
        median = f"> {row['at_least_seconds']:,.0f} s"
    if row["over_limit"]:
        steps = f"over the limit: {steps if row['median_seconds'] else 'none'}"
    if row["method"] == "floor":
        if row["chunkings"]:
            steps = f"{row['chunkings']} chunkings{'' if row['all_chunkings'] else ', then out of time'}"
        return [median, NOT_KNOWN, _time_ratio(row), *[NOT_KNOWN] * 7, steps]
    return [
        median,
        _number(row["cpu_seconds"] and row["cpu_seconds"] * 1e3, ",.1f", " ms"),
        _time_ratio(row),
        _number(row["to_floor"], ".2f"),
        _number(row["peak_bytes"] and row["peak_bytes"] / 2**20, ",.1f", " MiB"),
        _number(row["peak_ratio"], ".3f"),
        _number(row["matrices"], "d"),
        _number(row["gradient_error"], ".2e"),
        _number(row["gradient_error_ratio"], ".2f"),
        _number(row["loss_difference"], ".1e"),
        steps,
    ]


def _number(value, form: str, unit: str = "") -> str:
    return NOT_KNOWN if value is None else f"{value:{form}}{unit}"


def _time_ratio(row: dict) -> str:
    if row["ratio"] is None and row["ratio_below"] is not None:
        return f"< {row['ratio_below']:.3f}"
    return _number(row["ratio"], ".3f")


def draw(report: dict, path: Path) -> None:
    """Bars of time and peak memory by problem and method. What is known as a bound is hatched; long bars are cut."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state
    from matplotlib.patches import Patch

    rows = {(row["problem"], row["method"]): row for row in report["rows"]}
    problems = list(dict.fromkeys(problem for problem, _ in rows))
    ran = {method for (_, method), row in rows.items() if row["median_seconds"]} - {"naive", "floor"}
    methods = [method for method in dict.fromkeys(method for _, method in rows) if method in ran]
    width, longest = 0.8 / max(len(methods), 1), 2.0
    figure = Figure(figsize=(5 + 1.6 * len(problems), 7.5), layout="constrained")
    above, below = figure.subplots(2)
    for axes, label, name, bound in (
        (above, "time of a step", "ratio", "ratio_below"),
        (below, "peak memory", "peak_ratio", None),
    ):
        for (problem, method), row in rows.items():
            ratio = row[name] or row.get(bound)
            if method not in methods or ratio is None:
                continue
            number = methods.index(method)
            left = problems.index(problem) - 0.4 + (number + 0.5) * width
            hatch = None if row[name] else "//"
            axes.bar(left, min(ratio, longest), width, color=f"C{number}", hatch=hatch, edgecolor="white")
            text = f"{ratio:.2f}" if row[name] else f"< {ratio:.2f}"
            axes.text(left, min(ratio, longest), text, ha="center", va="bottom", fontsize=8)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_ylabel(f"{label}, ratio to naive")
        axes.set_xlim(-0.5, len(problems) - 0.5)
        axes.set_ylim(0, longest * 1.08)
        names = [
            problem.replace(",", ", ").replace(", float", "\nfloat").replace(", bf", "\nbf") for problem in problems
        ]
        axes.set_xticks(range(len(problems)), names)
    lines = []
    for x, problem in enumerate(problems):
        floor = rows.get((problem, "floor"), {})
        if height := floor.get("ratio") or floor.get("ratio_below"):
            lines = [above.hlines(height, x - 0.45, x + 0.45, color="black", label="floor: the three products")]
    patches = [Patch(color=f"C{number}", label=method) for number, method in enumerate(methods)]
    figure.legend(handles=patches + lines, loc="outside upper center", ncols=len(methods) + 1, fontsize=9)
    figure.savefig(path, dpi=130)
