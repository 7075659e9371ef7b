"""The scripts of examples/ as a user starts them, in the process of the tests."""

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import Seq2SeqTrainer

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str
    names: dict  # of the script's module


@pytest.fixture
def as_script(monkeypatch, capsys):
    """A script as `python script ...` runs it, in this process: ten imports of torch less."""

    def run(script, *arguments) -> Done:
        path = EXAMPLES / script
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(path.parent))
        capsys.readouterr()
        code, names = None, {}
        try:
            names = runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        is_text = isinstance(code, str)  # Python prints it, and ends with 1
        told = f"{printed.err}\n{code}" if is_text else printed.err
        return Done(1 if is_text else code or 0, printed.out, told, names)

    return run


@pytest.fixture
def given_to_trainer(monkeypatch):
    """The model that a call makes a `Seq2SeqTrainer` of. The call ends there."""

    def found(call, *args, **kwargs):
        models = []

        def made(self, model, **kwargs):
            models.append(model)
            raise InterruptedError

        with monkeypatch.context() as patch:
            patch.setattr(Seq2SeqTrainer, "__init__", made)
            with pytest.raises(InterruptedError):
                call(*args, **kwargs)
        return models[0]

    return found
