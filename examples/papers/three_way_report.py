"""What `three_way.py` reports: the table, the paired test, the shares of the gradient by role, and the picture."""

from pathlib import Path
from statistics import fmean as _mean

from rich.table import Table

from hf_tying.config import SCHEMES


def role_shares(history: list[dict]) -> dict[str, float]:
    """The share of the tied matrix's gradient norm that comes through each role, as a mean over all logs."""
    logs = {role: _series(history, key)[1] for role, key in share_keys(history).items()}
    return {role: sum(values) / len(values) for role, values in logs.items()}


def share_keys(history: list[dict]) -> dict[str, str]:
    """The keys of those shares in the log, by role, for the group of several roles if there is one."""
    keys = sorted({key for log in history for key in log if key.startswith("grad_share/")})
    groups = [key.split("/")[1] for key in keys]
    return {key.split("/")[2]: key for key, group in zip(keys, groups, strict=True) if groups.count(group) > 1}


def paired_tests(results: list[dict], folders: dict, references: list[str], tokenize: str) -> list[dict]:
    """Each tied scheme against `none` of the same seed, by paired bootstrap resampling (Koehn 2004)."""
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    tests = []
    for seed in dict.fromkeys(result["seed"] for result in results):
        schemes = [result["scheme"] for result in results if result["seed"] == seed]
        if "none" not in schemes or len(schemes) < 2:
            continue
        schemes.sort(key=lambda scheme: scheme != "none")  # the first is the baseline
        texts = {
            s: (folders[s, seed] / "translations.txt").read_text(encoding="utf-8").split("\n")[:-1] for s in schemes
        }
        metric = BLEU(tokenize=tokenize, force=True)
        _, scores = PairedTest(list(texts.items()), {"BLEU": metric}, [references], test_type="bs", n_samples=1000)()
        base, *others = scores["BLEU"]
        for scheme, other in zip(schemes[1:], others, strict=True):
            difference = other.score - base.score
            p_value = float(other.p_value) if difference else 1.0  # sacrebleu calls equal scores significant
            tests.append({"seed": seed, "scheme": scheme, "difference": difference, "p_value": p_value})
    return tests


def results_table(results: list[dict], tests: list[dict]) -> Table:
    """A row for each run, and one with the means of a scheme that was run with several seeds."""
    table = Table(title="The same model, sentence pairs, order and number of updates")
    columns = ("", "seed", "parameters", "of untied", "updates", "tokens/s", "validation", "BLEU", "chrF")
    for column in (*columns, "to none (p)", "gradient by role"):
        table.add_column(column, justify="left" if column in ("", "gradient by role") else "right")
    against = {(test["scheme"], test["seed"]): test for test in tests}
    for scheme in dict.fromkeys(result["scheme"] for result in results):
        runs = [result for result in results if result["scheme"] == scheme]
        for result in runs:
            test = against.get((scheme, result["seed"]))
            difference = f"{test['difference']:+.2f} ({test['p_value']:.3f})" if test else ""
            scores = [f"{result[name]['score']:.2f} ± {result[name]['confidence']:.2f}" for name in ("bleu", "chrf")]
            table.add_row(*_cells([result]), *scores, difference, _roles(result))
        if len(runs) > 1:
            scores = [f"{_mean(result[name]['score'] for result in runs):.2f}" for name in ("bleu", "chrf")]
            differences = [
                against[scheme, result["seed"]]["difference"]
                for result in runs
                if against.get((scheme, result["seed"]))
            ]
            table.add_row(*_cells(runs), *scores, f"{_mean(differences):+.2f}" if differences else "", "")
    return table


def _cells(runs: list[dict]) -> list[str]:
    """The first cells of a row, of one run or as means of several."""
    return [
        runs[0]["scheme"],
        str(runs[0]["seed"]) if len(runs) == 1 else "mean",
        f"{runs[0]['parameters']:,}",
        f"{runs[0]['share']:.1%}",
        f"{runs[0]['updates']:,}",
        f"{_mean(run['tokens_per_second'] for run in runs):,.0f}",
        f"{_mean(run['validation_loss'] for run in runs):.3f}",
    ]


def _roles(result: dict) -> str:
    return ", ".join(f"{role} {share:.0%}" for role, share in result["role_shares"].items())


def plot(results: list[dict], path: Path):
    """Training and validation loss, BLEU with its interval, and the gradient by role where all three are tied."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(17, 4), layout="constrained")
    training, validation, bleu, gradient = figure.subplots(1, 4)
    color = {scheme: f"C{i}" for i, scheme in enumerate(SCHEMES)}
    role_color = {"source": "C5", "target": "C6", "output": "C7"}
    for i, result in enumerate(results):
        scheme, history = result["scheme"], result["history"]
        name = f"{scheme}, seed {result['seed']}"
        for axes, key in ((training, "loss"), (validation, "eval_loss")):
            axes.plot(*_series(history, key), color=color[scheme], label=name)
        score = result["bleu"]
        bleu.errorbar(i, score["score"], score["confidence"], fmt="o", capsize=4, color=color[scheme])
        if scheme == "three_way":
            for role, key in share_keys(history).items():
                gradient.plot(*_series(history, key), color=role_color[role], label=f"{role}, seed {result['seed']}")
    bleu.set_xticks(range(len(results)), [f"{r['scheme']}\n{r['share']:.1%}\nseed {r['seed']}" for r in results])
    training.set(title="training", ylabel="loss in nats per token", xlabel="updates")
    validation.set(title="validation", xlabel="updates")
    bleu.set(title="test BLEU, 95% interval", xlabel="share of the untied parameters", xmargin=0.2)
    gradient.set(
        title="gradient of the three_way matrix", ylabel="share through each role", xlabel="updates", ylim=(0, 1)
    )
    for axes in (training, validation, bleu, gradient):
        axes.grid(alpha=0.3)
    for axes in (training, validation, gradient):
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=130)


def _series(history: list[dict], key: str) -> tuple[list[int], list[float]]:
    logs = [log for log in history if key in log]
    return [log["step"] for log in logs], [log[key] for log in logs]
