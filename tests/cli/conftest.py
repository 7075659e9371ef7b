"""The command line, run in this process."""

import sys

import pytest

from hf_tying.cli import main


@pytest.fixture
def hf_tying(monkeypatch, capsys):
    """Run the command line in this process: exit status, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-tying", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return run
