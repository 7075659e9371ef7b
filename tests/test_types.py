"""`py.typed` is kept: a type checker and an editor see each public name, as it is at run time."""

import ast
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest

import hf_tying

from .processes import ROOT, run_python

PACKAGE = Path(hf_tying.__file__).parent
#: The packages that have public names; those of one model family give theirs to `hf_tying.models`.
ROOMS = {
    ".".join(("hf_tying", *path.parent.relative_to(PACKAGE).parts)): path
    for path in sorted(PACKAGE.rglob("__init__.py"))
    if "__all__" in path.read_text(encoding="utf-8") and path.parent.parent.name != "models"
}
LAZY = [room for room, path in ROOMS.items() if "lazy_names(" in path.read_text(encoding="utf-8")]
NAMES = [f"{room}.{name}" for room in ROOMS for name in importlib.import_module(room).__all__]

#: Uses of the public names: what a checker must say of each line, in the words that it has for it.
USES = {
    "hf_tying.tie(3, scheme=4, nonsense=True)": 'No parameter named "nonsense"',
    'hf_tying.tie(3, "two_way")': '"Literal[3]" is not assignable to "PreTrainedModel"',
    "hf_tying.tei": '"tei" is not a known attribute',
    "from hf_tying import tei": '"tei" is unknown import symbol',
    "hf_tying.assert_tied()": 'Argument missing for parameter "model"',
    'reveal_type(hf_tying.tie(model, "two_way"))': '"TiedLSTMForCausalLM"',
    "reveal_type(hf_tying.tie(llama, ['a', 'b']))": '"TiedLlama"',
    "reveal_type(TiedLlamaConfig().tying_config)": '"TyingConfig"',
    "reveal_type(hf_tying.untie(model))": '"TiedLSTMForCausalLM"',
    "reveal_type(hf_tying.use_tied_loss(model))": '"TiedLSTMForCausalLM"',
    "reveal_type(hf_tying.merge_projection(hf_tying.use_projection(model)))": '"TiedLSTMForCausalLM"',
    "reveal_type(hf_tying.tying_report(model))": '"TyingReport"',
    "reveal_type(hf_tying.losses.tied_cross_entropy(x, x, x))": '"Tensor"',
}
PREAMBLE = """import torch
from transformers import LlamaConfig, LlamaForCausalLM
import hf_tying
{imports}
class TiedLlamaConfig(hf_tying.TyingConfigMixin, LlamaConfig):
    model_type = "tied_llama"
class TiedLlama(hf_tying.TiedModelMixin, LlamaForCausalLM):
    config_class = TiedLlamaConfig
llama = TiedLlama(TiedLlamaConfig(tying={{"version": 1, "scheme": "two_way"}}))
model = hf_tying.models.TiedLSTMForCausalLM(hf_tying.models.TiedLSTMConfig())
x = torch.zeros(2, 2)
"""


def constant(tree: ast.Module, name: str):
    """The literal that a module assigns to `name`."""
    [found] = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == name]
    return ast.literal_eval(found)


@pytest.mark.parametrize("room", LAZY)
def test_what_checkers_import_is_what_is_imported_when_it_is_asked_for(room):
    tree = ast.parse(ROOMS[room].read_text(encoding="utf-8"))
    [guarded] = [node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING"]
    seen = {
        alias.name: "." * (node.level - 1) + node.module
        for node in guarded.body
        for alias in node.names
        if alias.asname is None
    }
    assert seen == constant(tree, "_HOME")
    at_once = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    listed = constant(tree, "__all__")
    assert len(listed) == len(set(listed)) and seen.keys() <= set(listed) <= seen.keys() | at_once


def test_the_marker_is_in_what_is_built(tmp_path):
    program = "import sys; from setuptools import setup; sys.argv[:1] = ['setup.py', '-q']; setup()"
    run_python("-c", program, "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "built")
    assert (tmp_path / "built" / "hf_tying" / "py.typed").is_file()


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, list[str]]:
    """What the checker says of each public name that is revealed, and of each line of `USES`."""
    if importlib.util.find_spec("basedpyright") is None:
        pytest.skip("basedpyright is not installed: pip install -e '.[test]' -c constraints.txt")
    folder = tmp_path_factory.mktemp("types")
    lines = [*(f"reveal_type({name})" for name in NAMES), *USES]
    text = PREAMBLE.format(imports="\n".join(f"import {room}" for room in ROOMS)) + "\n".join(lines)
    (folder / "uses.py").write_text(text + "\n", encoding="utf-8")
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard", "pythonVersion": "3.11"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    arguments = ("--outputjson", "--pythonpath", sys.executable, "uses.py")
    done = run_python("-m", "basedpyright", *arguments, cwd=folder, check=False)
    first = text.splitlines().index(lines[0])
    found: dict[str, list[str]] = {line: [] for line in ["preamble", *lines]}
    for message in json.loads(done.stdout)["generalDiagnostics"]:
        at = message["range"]["start"]["line"] - first
        found["preamble" if at < 0 else lines[at]].append(message["message"])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_a_type(said, name):
    [message] = said[f"reveal_type({name})"]
    revealed = message.split('" is "')[1].rstrip('"')
    assert revealed not in ("Any", "Unknown") and not revealed.startswith("Module("), message
    assert "Unknown" not in revealed, message


@pytest.mark.parametrize("use", USES)
def test_a_use_is_judged_as_at_run_time(said, use):
    assert any(USES[use] in message for message in said[use]), said[use]


def test_the_class_form_is_accepted(said):
    assert said["preamble"] == []


def test_an_editor_completes_the_public_names():
    if importlib.util.find_spec("jedi") is None:
        pytest.skip("jedi is not installed: pip install -e '.[test]' -c constraints.txt")
    program = """
import json, jedi, sys
complete = lambda text: [c.name for c in jedi.Script(text, environment=jedi.InterpreterEnvironment()).complete()]
print(json.dumps({room: complete(f"import {room}; {room}.") for room in sys.argv[1:]}))
"""
    completed = json.loads(run_python("-c", program, *ROOMS).stdout)
    for room, names in completed.items():
        assert set(importlib.import_module(room).__all__) <= set(names), room
