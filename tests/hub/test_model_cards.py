"""The cards of the reference runs are those that the code makes, and their numbers are those of the results."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from hf_tying.hub.words import number

from ..processes import ROOT

CARDS = ROOT / "model_cards"
#: A path from the root of a file system, or from a home: no part of an address, of a marker, of `me/model`.
PLACE = re.compile(r"(?<![\w.:/>-])/[\w.-]+/|~/|file://|\b[A-Za-z]:\\")
RECORDS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((CARDS / "records").glob("*.json"))}


@pytest.fixture(scope="module")
def making():
    spec = importlib.util.spec_from_file_location("make_reference_cards", CARDS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", RECORDS)
def test_a_card_is_what_the_code_makes_of_the_run(name, making):
    assert (CARDS / f"{name}.md").read_text(encoding="utf-8") == making.make(RECORDS[name]), "make cards"


@pytest.mark.parametrize("name", RECORDS)
def test_the_numbers_of_a_card_are_those_of_the_results(name, making):
    record, text = RECORDS[name], (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert record["metrics"]
    for run, results in record["results"].items():
        for metric in record["metrics"]:
            value = making.at(results, metric)
            assert isinstance(value, float | int) and f" {number(value)} |" in text, (run, metric, value)


@pytest.mark.parametrize("name", RECORDS)
def test_a_card_says_how_the_run_was_made_and_names_no_place_of_a_machine(name):
    record = RECORDS[name]
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert record["facts"]["command"] in text and record["facts"]["note"] in text
    for content in (text, json.dumps(record)):
        assert not (found := PLACE.search(content)), content[found.start() - 40 : found.end() + 40]


def test_a_place_of_a_machine_is_seen_and_an_address_is_none():
    for place in ("--output_dir /srv/run", '"/mnt/data"', "`/x/y`", "~/models", "file:///x", "(C:\\runs)"):
        assert PLACE.search(place), place
    for other in ("https://huggingface.co/me/x", "<!-- /hf_tying:ties -->", "</b>", "me/model", "5 / 3", "tokens/s"):
        assert not PLACE.search(other), other


def test_every_card_has_a_record_and_the_templates_are_those_of_the_package():
    cards = {path.stem for path in CARDS.glob("*.md")} - {"README", "tied_model", "tied_lora"}
    assert cards == RECORDS.keys() and len(cards) >= 10
    for template in ("tied_model.md", "tied_lora.md"):
        packaged = Path(ROOT, "hf_tying", "hub", "templates", template)
        assert (CARDS / template).read_text(encoding="utf-8") == packaged.read_text(encoding="utf-8")
