"""One pytest session in a process of its own: `python session.py <file> <upstream tests> <results>`.

Run by `__main__`, apart from its own process because the package name `tests` means upstream's tests here, and this
repository's there.
"""

import json
import os
import sys
import types
from pathlib import Path

import pytest

# What upstream's common tests import and its source distribution does not ship. The tests that these two would add
# are not run.
STUBS = {"tests.exporters.test_export": "ExportTesterMixin", "tests.generation.test_utils": "GenerationTesterMixin"}

# A test, or one test of one family, and why it says nothing here. What needs a GPU, deepspeed and the like is skipped
# by upstream's own marks.
DESELECTED = {
    "test_generation_tester_mixin_inheritance": "asks for GenerationTesterMixin, which the sdist does not ship",
    "TestModelAndLayerStatus::test_transformers_model": "loads an adapter from the Hub",
    "T5::test_model_base_model_prefix": "T5 holds encoder and decoder itself, there is no base model under its prefix",
}


# Tests that `tied.py` runs with one thing changed.
def install_upstream(folder: Path) -> None:
    """Make `tests` upstream's package, wherever this repository is on the path, with stubs for what it lacks."""
    package = types.ModuleType("tests")
    package.__path__ = [str(folder)]
    sys.modules["tests"] = package
    for name, mixin in STUBS.items():
        parent = name.rpartition(".")[0]
        sys.modules[parent] = types.ModuleType(parent)
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], mixin, type(mixin, (), {}))


class Recorder:
    """Write one JSON line per finished test: `{"family", "test", "outcome", "reason", "seconds"}`."""

    def __init__(self, path: Path):
        self.file = path.open("w", encoding="utf-8")
        self.phases: dict[str, list] = {}

    def write(self, **entry) -> None:
        print(json.dumps(entry), file=self.file, flush=True)

    def pytest_collection_modifyitems(self, config, items):
        chosen, out, why = [], [], {}
        for item in items:
            name = item.originalname or item.name
            family = f"{item.cls.__name__}::{name}"
            key = next((key for key in (name, family) if key in DESELECTED), family)
            # `None` for a test that is run, an empty reason for one that is not meant.
            reason = DESELECTED.get(key) or getattr(item.module, "left_out", lambda item: None)(item)
            (chosen if reason is None else out).append(item)
            if reason:
                why[key] = reason
        items[:] = chosen
        config.hook.pytest_deselected(items=out)
        self.write(collected=len(items), deselected=why)

    def pytest_runtest_logreport(self, report):
        self.phases.setdefault(report.nodeid, []).append(report)

    def pytest_runtest_logfinish(self, nodeid):
        reports = self.phases.pop(nodeid)
        # Subtests report too: one that fails fails its test, one that is skipped does not make the test a skipped one.
        failed = [report for report in reports if report.failed]
        skipped = [report for report in reports if report.skipped and type(report) is pytest.TestReport]
        outcome = "failed" if failed else "skipped" if skipped else "passed"
        _, family, test = nodeid.split("::", 2)
        reason = _reason((failed or skipped or [None])[0])
        seconds = sum(report.duration for report in reports)
        self.write(family=family, test=test, outcome=outcome, reason=reason, seconds=round(seconds, 3))


def _reason(report) -> str:
    """Why, in one line, without the traceback."""
    if report is None:
        return ""
    if report.skipped:
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash else str(report.longrepr)
    lines = message.strip().splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def main() -> int:
    file, upstream, results = map(Path, sys.argv[1:])
    install_upstream(upstream)
    # No configuration and no conftest: those of the repository are for its own tests.
    options = ["-c", os.devnull, "--rootdir", str(file.parent), "--import-mode=importlib", "-p", "no:cacheprovider"]
    # In one order everywhere, whatever else is installed: the two sessions are compared.
    options += ["-p", "no:randomly"]
    options += ["--noconftest", "--tb=short", "-rf", "-W", "ignore", str(file)]
    return pytest.main(options, plugins=[Recorder(results)])


if __name__ == "__main__":
    sys.exit(main())
