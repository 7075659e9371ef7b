"""What `run_tied_lora.py` reports: the methods over their seeds, in a table and as JSON."""

from statistics import fmean, median, stdev

from rich.table import Table

#: Title and decimals of each metric.
METRICS = {"accuracy": ("accuracy", 2), "perplexity": ("perplexity", 3), "bleu": ("BLEU", 2), "chrf": ("chrF", 2)}


def summary_of(results: list[dict], metrics: tuple[str, ...]) -> list[dict]:
    """One row per method, over its seeds: metrics with mean and deviation, sizes, and steps as a ratio to LoRA's."""
    of_lora = {result["seed"]: result["step_seconds"] for result in results if result["method"] == "lora"}
    rows = []
    for method in dict.fromkeys(result["method"] for result in results):
        runs = [result for result in results if result["method"] == method]
        ratios = [run["step_seconds"] / of_lora[run["seed"]] for run in runs if of_lora.get(run["seed"])]
        first = runs[0]
        same = ("parameters", "of_lora", "head_parameters", "adapter_bytes", "memory_kind", "learning_rate")
        rows.append(
            {"method": method, "seeds": [run["seed"] for run in runs]}
            | {name: first[name] for name in same}
            | {
                "metrics": {name: over_seeds([run["scores"][name] for run in runs]) for name in metrics},
                "memory_bytes": max(run["memory_bytes"] for run in runs),
                "step_seconds": median(run["step_seconds"] for run in runs),
                "step_of_lora": median(ratios) if ratios else None,
            }
        )
    return rows


def over_seeds(values: list[float]) -> dict:
    """Mean, sample standard deviation (none of one value), and the values."""
    return {"mean": fmean(values), "deviation": stdev(values) if len(values) > 1 else None, "values": values}


def results_table(rows: list[dict], title: str) -> Table:
    """The summary as a table."""
    table = Table(title=title)
    metrics = list(rows[0]["metrics"])
    memory = {"peak": "peak memory", "saved": "saved for backward"}[rows[0]["memory_kind"]]
    head = ["+ head"] if any(row["head_parameters"] for row in rows) else []
    columns = ["", "rate", *(METRICS[name][0] for name in metrics), "parameters", "of LoRA", *head, "adapter"]
    for column in (*columns, "step", "of LoRA", memory):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        cells = [row["method"], f"{row['learning_rate']:g}"]
        cells += [metric_cell(name, row["metrics"][name]) for name in metrics]
        cells += [f"{row['parameters']:,}", f"{row['of_lora']:.2%}"]
        cells += [f"{row['head_parameters']:,}"] if head else []
        cells += [f"{row['adapter_bytes']:,} B", f"{row['step_seconds'] * 1000:.1f} ms"]
        cells += ["" if row["step_of_lora"] is None else f"{row['step_of_lora']:.3f}"]
        table.add_row(*cells, f"{row['memory_bytes'] / 2**20:,.2f} MiB")
    return table


def metric_cell(name: str, values: dict) -> str:
    """Mean ± deviation, with the decimals of the metric."""
    digits = METRICS[name][1]
    deviation = "" if values["deviation"] is None else f" ± {values['deviation']:.{digits}f}"
    return f"{values['mean']:.{digits}f}{deviation}"
