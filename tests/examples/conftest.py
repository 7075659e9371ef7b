"""The scripts of examples/ as a user starts them, in the process of the tests."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


class Done:
    def __init__(self, returncode, stdout, stderr):
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


@pytest.fixture
def as_script(monkeypatch, capsys):
    """A script as `python script ...` runs it, in this process: ten imports of torch less."""

    def run(script, *arguments) -> Done:
        path = EXAMPLES / script
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(path.parent))
        capsys.readouterr()
        code = None
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        is_text = isinstance(code, str)  # Python prints it, and ends with 1
        return Done(1 if is_text else code or 0, printed.out, f"{printed.err}\n{code}" if is_text else printed.err)

    return run
