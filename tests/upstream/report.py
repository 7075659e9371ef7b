"""What two sessions, tied and stock, say together."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass
class Session:
    """The results of one session.

    Args:
        path: the JSON lines that `session.py` wrote.
    """

    path: Path
    collected: int = 0
    deselected: dict[str, str] = field(default_factory=dict)
    results: dict[tuple[str, str], dict] = field(default_factory=dict)

    def read(self) -> "Session":
        """Read the file anew; while the session runs it grows."""
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            entry = json.loads(line)
            if "collected" in entry:
                self.collected = entry["collected"]
                self.deselected = entry["deselected"]
            else:
                self.results[entry["family"], entry["test"]] = entry
        return self

    @property
    def complete(self) -> bool:
        return 0 < self.collected == len(self.results)

    def counts(self, family: str) -> Counter:
        return Counter(entry["outcome"] for (of, _), entry in self.results.items() if of == family)


def joined(sessions: list[Session]) -> Session:
    """One session with the results of several, whose families are others."""
    whole = Session(sessions[0].path)
    for session in sessions:
        whole.collected += session.collected
        whole.deselected |= session.deselected
        whole.results |= session.results
    return whole


@dataclass
class Finding:
    """One test that did not go as it should."""

    family: str
    test: str
    reason: str
    control: str
    counts: bool


def findings(tied: Session | None, stock: Session | None) -> list[Finding]:
    """The tests that fail, and those that the tied class skips while the stock class runs them.

    A failure counts against the tied class unless the stock class fails the same test. With one session alone every
    failure counts.
    """
    found = []
    for (family, test), entry in (tied or stock).results.items():
        control = stock.results.get((family, test)) if tied and stock else None
        outcome = control["outcome"] if control else "not run"
        if entry["outcome"] == "failed":
            found.append(Finding(family, test, entry["reason"], outcome, outcome != "failed"))
        elif entry["outcome"] == "skipped" and outcome == "passed":
            found.append(Finding(family, test, f"skipped: {entry['reason']}", outcome, True))
    return found


def to_dict(sessions: dict[str, Session], found: list[Finding], versions: dict[str, str], seconds: float) -> dict:
    """The report as JSON programs read it."""
    families = list(dict.fromkeys(family for session in sessions.values() for family, _ in session.results))
    # One session speaks for both: what tied classes skip and stock classes do not is among the findings.
    first = next(iter(sessions.values()))
    skips = Counter(entry["reason"] for entry in first.results.values() if entry["outcome"] == "skipped")
    return {
        "versions": versions,
        "seconds": round(seconds, 1),
        "classes": {
            family: {
                kind: {key: session.counts(family)[key] for key in ("passed", "failed", "skipped")}
                for kind, session in sessions.items()
            }
            for family in families
        },
        "failures": [asdict(finding) for finding in found],
        "deselected": first.deselected,
        "skip_reasons": dict(skips.most_common()),
    }


def show(report: dict, console: Console) -> None:
    """Print the report as tables."""
    kinds = list(next(iter(report["classes"].values())))
    versions = (
        f"{name} {report['versions'][name]}" for name in ("transformers", "peft") if name in report["versions"]
    )
    table = Table("class", title=f"upstream's own tests: {', '.join(versions)}")
    for kind in kinds:
        for outcome in ("passed", "failed", "skipped"):
            table.add_column(f"{kind}\n{outcome}", justify="right")
    for family, counts in report["classes"].items():
        table.add_row(family, *(str(number) for kind in kinds for number in counts[kind].values()))
    console.print(table)
    lines = [(f"{times:4d} x skipped: {reason}", "dim") for reason, times in report["skip_reasons"].items()]
    out: dict[str, list[str]] = {}
    for test, reason in report["deselected"].items():
        out.setdefault(reason, []).append(test)
    for reason, tests in out.items():
        named = ", ".join(tests[:3]) + f" and {len(tests) - 3} more" * (len(tests) > 3)
        lines.append((f"deselected: {named}: {reason}", "dim"))
    alike: dict[tuple, list[str]] = {}
    for finding in report["failures"]:
        alike.setdefault((finding["counts"], finding["family"], finding["reason"]), []).append(finding["test"])
    for (counts, family, reason), tests in alike.items():
        verdict, style = ("FAILED", "red") if counts else ("fails for the stock class too", "yellow")
        lines.append((f"{verdict}: {family}: {', '.join(tests)}: {reason}", style))
    for line, style in lines:
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
