"""The tested range of transformers: one word above it, none inside it, and the same range wherever it is written."""

import configparser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import MarianMTModel

from hf_tying.hook import TESTED, warn_if_untested

from .processes import run_python
from .tiny import tiny_inputs, tiny_model

ROOT = Path(__file__).parents[1]
OLDEST, NEWEST = map(Version, TESTED)


TRANSFORMERS_FIRST = """
import transformers
transformers.__version__ = "99.0.0"
import hf_tying
"""
HF_TYING_FIRST = """
import sys, hf_tying
assert "transformers" not in sys.modules
hf_tying.hook.TESTED = ("5.0.0", "5.1.0")
"""


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {package: Version(pin) for package, _, pin in (line.partition("==") for line in lines if "==" in line)}


def requirement() -> Requirement:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = metadata["options"]["install_requires"].splitlines()
    [found] = [line for line in lines if line.startswith("transformers")]
    return Requirement(found)


class TestTheWarning:
    @pytest.mark.parametrize("version", ["5.25.0", "5.25.0.dev0", "5.100.0", "6.0.0rc1"])
    def test_above_the_range_names_it_what_is_there_and_the_way_out(self, version, told):
        warn_if_untested(SimpleNamespace(__version__=version))
        [message] = told
        assert f"transformers {OLDEST} to {NEWEST}, and this is {version}" in message
        way_out = Requirement(message.partition("pip install '")[2].partition("'")[0])
        assert NEWEST in way_out.specifier and Version(version) not in way_out.specifier

    @pytest.mark.parametrize("version", [*TESTED, "5.23.0", f"{NEWEST.major}.{NEWEST.minor}.99", "5.9.0"])
    def test_there_is_none_elsewhere(self, version, told):
        warn_if_untested(SimpleNamespace(__version__=version))
        assert told == []

    @pytest.mark.parametrize(
        "program", [TRANSFORMERS_FIRST, HF_TYING_FIRST], ids=["transformers first", "hf_tying first"]
    )
    def test_it_comes_once_when_the_package_is_imported(self, program):
        done = run_python("-c", program + "from transformers import GPT2LMHeadModel\nimport hf_tying.ties.tying")
        assert done.stderr.count("hf_tying is tested with transformers") == 1


def test_the_line_of_the_faq_freezes_what_no_file_of_marian_keeps(tmp_path):
    """transformers 5.24.0 trains the positions of a Marian that was loaded, stock too."""
    tiny_model("marian").save_pretrained(tmp_path / "start")
    model = MarianMTModel.from_pretrained(tmp_path / "start")
    for side in (model.get_encoder(), model.get_decoder()):
        side.embed_positions.requires_grad_(False)
    inputs = tiny_inputs(model)
    model(**inputs).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0 if parameter.grad is None else 0.5 * parameter.grad
    model.save_pretrained(tmp_path / "trained")
    again = MarianMTModel.from_pretrained(tmp_path / "trained")
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


class TestTheRange:
    def test_is_that_of_the_constraints_of_make(self):
        assert pins("constraints-oldest.txt")["transformers"] == OLDEST
        assert pins("constraints-newest.txt")["transformers"] == NEWEST
        assert OLDEST < pins("constraints.txt")["transformers"] <= NEWEST

    @pytest.mark.parametrize("end", ["oldest", "newest"])
    def test_an_end_pins_no_name_that_the_whole_set_does_not(self, end):
        assert pins(f"constraints-{end}.txt").keys() <= pins("constraints.txt").keys()

    def test_begins_where_the_requirements_do_and_these_have_no_end(self):
        allowed = requirement().specifier
        assert OLDEST in allowed and Version("5.16.9") not in allowed
        assert Version("99.0.0") in allowed
