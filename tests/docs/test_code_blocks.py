"""Each code block of README.md and docs/ runs by itself, as a reader would run it; none asks for a network."""

import ast
import contextlib
import importlib
import io
import json
import re
import runpy
import shlex
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from hf_tying import TyingConfig, TyingError, cli

from ..processes import run_python
from .blocks import BLOCKS, MARKS, ROOT, Block
from .setups import SETUPS, make

pytestmark = pytest.mark.filterwarnings("ignore")


def of(*languages: str) -> list:
    return [pytest.param(block, id=str(block)) for block in BLOCKS if block.language in languages]


@pytest.fixture(scope="session")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder of its own, without the variables that a test run sets for torch's processes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def printed_alone(kept, tmp_path_factory) -> dict[str, str]:
    """What each block of stock transformers prints in a process that knows nothing of this package, each in a fork."""
    blocks = [block for block in BLOCKS if "stock" in block.marks]
    folder = tmp_path_factory.mktemp("stock")
    for number, block in enumerate(blocks):
        assert "hf_tying" not in block.code
        (folder / str(number)).mkdir()
        make(block.code, folder / str(number), kept)
        (folder / str(number) / "block.py").write_text(block.code, encoding="utf-8")
    run_python("-W", "ignore", "-c", IN_FORKS, cwd=folder, environment={"PYTHONPATH": None})
    return {str(block): (folder / str(i) / "printed").read_text("utf-8") for i, block in enumerate(blocks)}


IN_FORKS = """
import os, pathlib, runpy, sys
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

for folder in sorted(path for path in pathlib.Path.cwd().iterdir() if path.is_dir()):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, folder
        continue
    os.chdir(folder)
    sys.stdout = open("printed", "w", encoding="utf-8")
    runpy.run_path("block.py", run_name="__main__")
    assert "hf_tying" not in sys.modules
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.parametrize("block", of("python"))
def test_a_python_block_runs_as_printed(block: Block, here, kept, request):
    if "not run" in block.marks:
        assert block.marks["not run"]
        names_are_found(block)
        return
    if "stock" in block.marks:
        printed = request.getfixturevalue("printed_alone")[str(block)]
    else:
        make(block.code, here, kept)
        printed = run(block)
    if block.printed is not None:
        prints(block, printed)


def run(block: Block) -> str:
    """Run a block in this process, and return what it prints, and the message of the error that it is to end in."""
    names = {name: SETUPS[name]() for name in filter(None, block.marks.get("with", "").split(", "))}
    code = compile(block.code, str(block), "exec")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        if (expected := block.marks.get("raises")) is None:
            exec(code, names | {"__name__": "docs"})
        else:
            with pytest.raises(Exception) as error:
                exec(code, names | {"__name__": "docs"})
            assert error.type.__name__ == expected, error.value
            print(f"{_qualified(error.type)}: {error.value}")
    return output.getvalue()


def _qualified(error: type) -> str:
    return error.__name__ if error.__module__ == "builtins" else f"{error.__module__}.{error.__name__}"


def prints(block: Block, printed: str) -> None:
    """Whether the lines of the block after `block` were printed, in this order; `...` stands for any lines."""
    rest = [" ".join(line.split()) for line in printed.splitlines()]
    for line in (" ".join(line.split()) for line in block.printed.splitlines()):
        if line in ("", "..."):
            continue
        assert line in rest, f"{block} did not print {line!r}, but:\n{printed}"
        rest = rest[rest.index(line) + 1 :]


def names_are_found(block: Block) -> None:
    """Whether what a block imports from here, from transformers and from PEFT is there."""
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("hf_tying", "transformers", "peft"):
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


@pytest.mark.parametrize("block", of("sh"))
def test_the_commands_of_a_shell_block_do_what_they_say(block: Block, here, kept, monkeypatch):
    make(block.code, here, kept)
    for line in block.code.replace("\\\n", " ").splitlines():
        command = shlex.split(line, comments=True)
        if not command:
            continue
        if "not run" in block.marks:
            assert block.marks["not run"] and command[0] not in ("make", "pip")
            is_known(command)
        elif command[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert {word for word in command[1:] if "=" not in word} <= {*targets}
        elif command[0] == "pip":
            extras_are_there(command)
        elif command[0] in ("git", "pre-commit", "cd"):
            pass
        else:
            quick = shlex.split(block.marks.get("quick", ""))
            assert call([*command, *quick], monkeypatch) in (0, None)


def is_known(command: list[str]) -> None:
    """Whether a command that is not run is one of this package, or starts a script that is there."""
    scripts = [word for word in command if word.endswith(".py")]
    assert command[0] == "hf-tying" or scripts, command
    assert all((ROOT / script).is_file() for script in scripts), command


def call(command: list[str], monkeypatch) -> int | None:
    """Run a command in this process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    try:
        assert command[0] in ("hf-tying", "python"), command
        if command[0] == "hf-tying":
            monkeypatch.setattr(sys, "argv", command)
            cli.main()
        else:
            monkeypatch.setattr(sys, "argv", command[1:])
            runpy.run_path(str(ROOT / command[1]), run_name="__main__")
    except SystemExit as end:
        return end.code
    return None


def extras_are_there(command: list[str]) -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extras in re.findall(r"\[([\w,-]+)\]", " ".join(command)):
        assert {*extras.split(",")} <= {*setup["options.extras_require"]}


@pytest.mark.parametrize("block", of("json"))
def test_a_json_block_is_json_and_its_entry_is_one(block: Block):
    entry = json.loads(block.code).get("tying")
    assert entry is None or TyingConfig.from_dict(entry)


@pytest.mark.parametrize("block", of("yaml"))
def test_a_yaml_block_is_yaml(block: Block):
    assert yaml.safe_load(block.code)


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS}))
def test_every_block_is_of_a_kind_that_is_tested(page):
    for block in (block for block in BLOCKS if block.page == page):
        assert block.language in ("python", "sh", "json", "yaml", "text"), block
        assert block.marks.keys() <= {*MARKS}, block
        assert {*filter(None, block.marks.get("with", "").split(", "))} <= SETUPS.keys(), block


class TestTheTestsThemselves:
    """A block that fails is seen to fail."""

    def block(self, code: str, printed: str | None = None, **marks: str) -> Block:
        return Block("page.md", 1, "python", code, marks, printed)

    def test_an_error_that_is_not_announced_is_raised(self):
        with pytest.raises(ZeroDivisionError):
            run(self.block("1 / 0"))

    def test_an_announced_error_that_does_not_come_fails(self):
        with pytest.raises(pytest.fail.Exception):
            run(self.block("1 / 1", raises="TyingError"))

    def test_another_error_than_the_announced_one_fails(self):
        with pytest.raises(AssertionError):
            run(self.block("1 / 0", raises="TyingError"))

    def test_lines_that_are_not_printed_in_this_order_fail(self):
        block = self.block("print('a'); print('b')", printed="b\na\n")
        with pytest.raises(AssertionError, match="did not print 'a'"):
            prints(block, run(block))

    def test_an_import_that_is_not_there_is_found(self):
        with pytest.raises(AssertionError):
            names_are_found(self.block("from hf_tying import no_such_name"))

    def test_the_message_of_an_error_is_printed_with_its_class(self):
        block = self.block("from hf_tying import TyingError\nraise TyingError('no')", raises="TyingError")
        assert run(block) == f"{TyingError.__module__}.TyingError: no\n"
