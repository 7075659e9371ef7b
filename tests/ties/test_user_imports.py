"""What a published custom class imports of this package: carried along, or refused before a file is written."""

import ast
import importlib
import json
import sys

import pytest
from huggingface_hub import HfApi

from hf_tying import TyingError
from hf_tying.ties.remote_code import refuse_unloadable
from tests.processes import run_python

BASE = """from transformers import LlamaConfig, LlamaForCausalLM
{imports}


class MineConfig({config}, LlamaConfig):
    model_type = "mine_llama"


class Mine({mixin}, LlamaForCausalLM):
    config_class = MineConfig
{body}
"""
PLAIN = "from hf_tying import TiedModelMixin, TyingConfigMixin"
NAMES = {"config": "TyingConfigMixin", "mixin": "TiedModelMixin", "body": ""}

# How people import the package, and the other parts of the module where they differ.
CARRIED = {
    "plain": (PLAIN, {}),
    "comment in parentheses": (
        "from hf_tying import (TiedModelMixin,  # keeps, (the) ties\n  TyingConfigMixin,\n)", {},
    ),
    "comment at the end": (f"{PLAIN}  # noqa: F401", {}),
    "backslash": ("from hf_tying import TiedModelMixin, \\\n    TyingConfigMixin", {}),
    "indented": (f"if True:\n    {PLAIN}", {}),
    "fallback": (f"try:\n    {PLAIN}\nexcept ImportError:\n    raise", {}),
    "package": ("import hf_tying", {"config": "hf_tying.TyingConfigMixin", "mixin": "hf_tying.TiedModelMixin"}),
    "package renamed": ("import os, hf_tying as t", {"config": "t.TyingConfigMixin", "mixin": "t.TiedModelMixin"}),
    "package unused": (f"import hf_tying\n{PLAIN}", {}),
    "submodule": ("import hf_tying.ties.modeling as m\nfrom hf_tying import TyingConfigMixin",
                  {"mixin": "m.TiedModelMixin"}),
    "module as a name": ("from hf_tying import config\nfrom hf_tying.ties.modeling import TiedModelMixin",
                         {"config": "config.TyingConfigMixin"}),
    "in a method": (
        PLAIN,
        {"body": "    def f(self):\n        from hf_tying import tie  # later\n\n        return tie\n"},
    ),
    "words in a string": (f'{PLAIN}\nWORD = "é: import hf_tying"', {}),
}  # fmt: skip
REFUSED = {
    "star": ("from hf_tying import *", {}),
    "a value without a home": (f"{PLAIN}, __version__", {}),
    "by a string": (f'{PLAIN}\nimport importlib\nM = importlib.import_module("hf_tying.losses")', {}),
    "as a value": (f"{PLAIN}\nimport hf_tying\nIT = hf_tying", {}),
    "on a line with another": (f"import os; {PLAIN}", {}),
    "name given again": (f"{PLAIN}\ntry:\n    import hf_tying\nexcept ImportError:\n    hf_tying = None", {}),
    "version": (f"{PLAIN}\nimport hf_tying\nV = hf_tying.__version__", {}),
}


# Runs where this package is not installed: what became of the code in each folder.
ELSEWHERE = """
import json, sys

sys.modules["hf_tying"] = None
from transformers.dynamic_module_utils import get_class_from_dynamic_module

results = {}
for folder in sys.argv[1:]:
    try:
        results[folder] = get_class_from_dynamic_module("modeling_mine.Mine", folder).__name__
    except Exception as error:
        results[folder] = repr(error)
print(json.dumps(results))
"""


def built(source, imports, parts):
    """A model of a class in a module of the user's, in the folder `source`, with the given imports."""
    source.mkdir()
    text = BASE.format(imports=imports, **(NAMES | parts))
    (source / "modeling_mine.py").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(source))
        importlib.invalidate_caches()
        sys.modules.pop("modeling_mine", None)
        module = importlib.import_module("modeling_mine")
    module.MineConfig.register_for_auto_class()
    module.Mine.register_for_auto_class("AutoModelForCausalLM")
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    tying = {"version": 1, "scheme": "two_way"}
    return module.Mine(module.MineConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tying=tying))


@pytest.fixture
def model_of(tmp_path):
    """Builds a model, its code in `tmp_path / "source"`."""
    yield lambda imports, parts: built(tmp_path / "source", imports, parts)
    sys.modules.pop("modeling_mine", None)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The folder of each form as it was saved, and what another process, without this package, made of its code."""
    root = tmp_path_factory.mktemp("published")
    folders = {form: root / f"form_{number}" for number, form in enumerate(CARRIED)}
    for form, folder in folders.items():
        built(root / f"source_{folder.name}", *CARRIED[form]).save_pretrained(folder)
    sys.modules.pop("modeling_mine", None)
    done = run_python("-c", ELSEWHERE, *folders.values(), environment={"HF_MODULES_CACHE": str(root / "modules")})
    results = json.loads(done.stdout.splitlines()[-1])
    return {form: (folder, results[str(folder)]) for form, folder in folders.items()}


@pytest.mark.parametrize("form", CARRIED)
def test_published_code_loads_without_the_package(elsewhere, form):
    folder, result = elsewhere[form]
    text = (folder / "modeling_mine.py").read_text(encoding="utf-8")
    assert result == "Mine", text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("hf_tying") for alias in node.names), text
        elif isinstance(node, ast.ImportFrom):
            assert node.level or not node.module.startswith("hf_tying"), text


def test_what_loads_without_the_package_may_be_uploaded(model_of):
    refuse_unloadable(model_of(PLAIN, {}))


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_carried_is_refused_before_a_file_is_written(model_of, tmp_path, form):
    model = model_of(*REFUSED[form])
    with pytest.raises(TyingError, match="Cannot save the code of modeling_mine.py: line"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_and_links_of_the_user_stay_as_they_are(model_of, tmp_path):
    model, out = model_of(PLAIN, {}), tmp_path / "out"
    out.mkdir()
    own = b"# caf\xe9\nfrom hf_tying import TiedModelMixin, tie\n"
    kept = [out / "train.py", tmp_path / "outside.py", tmp_path / "behind_the_name.py"]
    for path in kept:
        path.write_bytes(own)
    (out / "linked.py").symlink_to(kept[1])
    (out / "modeling_mine.py").symlink_to(kept[2])
    model.save_pretrained(out)
    assert [path.read_bytes() for path in kept] == [own] * 3
    assert (out / "linked.py").is_symlink() and "from .hf_tying_" in (out / "modeling_mine.py").read_text()


def test_the_source_itself_is_never_overwritten(model_of, tmp_path):
    model = model_of(PLAIN, {})
    before = sorted((tmp_path / "source").iterdir())
    with pytest.raises(TyingError, match="would overwrite your own file"):
        model.save_pretrained(tmp_path / "source")
    assert sorted((tmp_path / "source").iterdir()) == before
    assert PLAIN in (tmp_path / "source" / "modeling_mine.py").read_text()


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained", "config"])
def test_nothing_is_uploaded_that_others_cannot_import(model_of, tmp_path, monkeypatch, way):
    helper = "NAME = __import__('hf_' + 'tying').__name__"  # no parser can see this
    model = model_of(f"{PLAIN}\n{helper}", {})

    def create_repo(*args, **kwargs):
        raise AssertionError("a repository was asked for")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    with pytest.raises(TyingError, match="Nothing is uploaded.*No module named 'hf_tying'"):
        if way == "save_pretrained":
            model.save_pretrained(tmp_path / "out", push_to_hub=True)
        else:
            (model.config if way == "config" else model).push_to_hub("me/mine")
    assert not (tmp_path / "out").exists()
