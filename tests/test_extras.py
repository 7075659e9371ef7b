"""A library of an extra is named, with the extra that brings it, whether it is missing or broken."""

import ast
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from hf_tying import TyingError
from hf_tying._extras import MissingLibraryError, require

ROOT = Path(__file__).parents[1]
#: Distributions whose module has another name.
MODULES = {"pyyaml": "yaml"}


def calls_of_require() -> list[tuple[str, str, str]]:
    """Each call in the package: file, library, extra."""
    found = []
    for path in sorted((ROOT / "hf_tying").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "require":
                module, _, extra = node.args
                if isinstance(module, ast.Constant):
                    found.append((path.name, module.value.partition(".")[0], extra.value))
    return found


def brought_by(extra: str) -> set[str]:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    found = set()
    for line in setup["options.extras_require"][extra].split("\n"):
        if inner := re.match(r"hf-tying\[([\w,]+)\]", line):
            found |= {library for name in inner[1].split(",") for library in brought_by(name)}
        elif line and not line.startswith("#"):
            name = re.match(r"[\w-]+", line)[0]
            found.add(MODULES.get(name, name))
    return found


@pytest.mark.parametrize("file, library, extra", calls_of_require())
def test_the_extra_that_is_named_brings_the_library(file, library, extra):
    assert library in brought_by(extra)


def test_the_calls_are_found():
    assert {"matplotlib", "sacrebleu", "babel"} <= {library for _, library, _ in calls_of_require()}


def test_what_is_there_is_returned():
    assert require("json", "Nothing", "plots") is json


def test_a_missing_library_is_named_with_its_extra():
    with pytest.raises(MissingLibraryError, match=r"^A picture needs nowhere, which is missing: pip install 'hf-"):
        require("nowhere.inside", "A picture", "plots")


def test_a_library_that_cannot_be_imported_is_told_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text("import another_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingLibraryError, match=r"broken_library, which cannot be imported \(No module named 'an"):
        require("broken_library", "A picture", "plots")


def test_a_submodule_that_is_loaded_already_does_not_stand_for_a_library_that_is_gone(monkeypatch):
    import json.decoder  # noqa: F401

    monkeypatch.setitem(sys.modules, "json", None)
    with pytest.raises(MissingLibraryError, match="json, which is missing"):
        require("json.decoder", "A picture", "plots")


def test_it_is_an_error_of_this_package_and_an_import_error():
    assert issubclass(MissingLibraryError, TyingError) and issubclass(MissingLibraryError, ImportError)
