"""Pushed by the real client to a Hub on 127.0.0.1, and loaded back with this package and without it."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from ..native_adapters import NATIVE_REFUSAL, needs_native_adapters
from ..processes import run_script

BOTH_FORMS = [
    "README.md", "adapter_config.json", "adapter_model.safetensors", "tied_lora/adapter_config.json",
    "tied_lora/adapter_model.safetensors",
]  # fmt: skip
#: By who has pushed it: Tied-LoRA adapters in repositories of their own.
NATIVE = () if NATIVE_REFUSAL else ("native",)
ADAPTERS = ("peft", *NATIVE, "trainer", "sft")
CARDS = ("tied", "group", "projection", "twice", "tied-trainer", "from-folder", "two", "mended", *ADAPTERS)


@pytest.fixture(scope="module")
def pushed(hub):
    return run_script("hub_push.py", variables=hub.variables)


@pytest.fixture(scope="module", params=["with", "without"])
def loaded(request, hub, pushed):
    return request.param, run_script("hub_load.py", request.param, variables=hub.variables)


@pytest.fixture(scope="module")
def cards(hub, pushed):
    return {name: hub.read(f"tester/{name}", "README.md").decode() for name in CARDS}


def largest_difference(found: dict, expected: dict) -> float:
    return max(abs(a - b) for a, b in zip(found["logits"], expected["logits"], strict=True))


def test_everybody_gets_the_values_that_were_pushed(loaded, pushed):
    who, found = loaded
    for name in ("base", "tied", "group", "tied-trainer"):
        assert largest_difference(found[name], pushed[name.replace("-", "_")]) == 0, name
    for name, of in {**{name: name for name in ADAPTERS}, "two": "two_adapters", "peft, dev": "peft"}.items():
        assert largest_difference(found[name], pushed[of]) < 1e-5, name
        assert found[name]["kind"].endswith("LORA") and "TIED" not in found[name]["kind"], name
    if NATIVE:
        assert largest_difference(found["sft, by transformers"], pushed["sft"]) < 1e-5
    assert found["tied"]["parameters"] == 6_224


def test_the_tied_form_and_a_projection_are_for_who_has_this_package(loaded, pushed):
    who, found = loaded
    for name, of in {"peft": "peft", "trainer": "trainer", "two": "two_adapters", **{n: n for n in NATIVE}}.items():
        if who == "with":
            assert largest_difference(found[f"{name}, tied"], pushed[of]) < 1e-6, name
        else:
            assert found[f"{name}, tied"]["error"] == "'TIED_LORA'", name
    difference = largest_difference(found["projection"], pushed["projection"])
    assert difference == 0 if who == "with" else difference > 0.1
    shared = found["group"]["parameters"]
    assert shared == (6_768 if who == "with" else 7_280)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_way_of_pushing_an_adapter_uploads_both_forms(name, hub, pushed):
    files = hub.files(f"tester/{name}")
    assert set(BOTH_FORMS) <= set(files)
    kinds = [json.loads(hub.read(f"tester/{name}", path))["peft_type"] for path in BOTH_FORMS[1::2]]
    assert kinds == ["LORA", "TIED_LORA"]


def test_a_checkpoint_to_resume_from_keeps_the_tied_form(hub, pushed):
    assert json.loads(hub.read("tester/trainer", "checkpoint-2/adapter_config.json"))["peft_type"] == "TIED_LORA"
    assert pushed["trainer"]["resumed"] == 3


def test_each_adapter_has_both_forms_in_the_folder_of_its_name(hub, pushed):
    files = hub.files("tester/two")
    assert files == sorted([*BOTH_FORMS, *(f"second/{path}" for path in BOTH_FORMS[1:])])


def test_other_adapters_are_pushed_as_ever(hub, pushed):
    assert hub.files("tester/lora") == BOTH_FORMS[:3]
    assert "hf_tying" not in hub.read("tester/lora", "README.md").decode()
    assert "hf_tying" not in hub.read("tester/base", "README.md").decode()


@pytest.mark.parametrize(
    "way",
    [
        *("peft", "tied_only", "trainer", "relative"),
        *(pytest.param(way, marks=needs_native_adapters) for way in ("native", "native_save")),
    ],
)
def test_a_base_model_in_a_folder_is_refused_before_a_repository_is_made(way, hub, pushed):
    message = pushed["local_bases"][way]
    assert message.startswith("Nothing is uploaded: the base model is")
    assert 'model.peft_config["default"].base_model_name_or_path = "owner/name"' in message
    assert "tester/local" not in hub.branches()


def test_the_way_out_of_the_refusal_works(hub, pushed, cards):
    assert ModelCard(cards["mended"]).data.base_model == "tester/base"
    for path in BOTH_FORMS[1::2]:
        assert json.loads(hub.read("tester/mended", path))["base_model_name_or_path"] == "tester/base"


def test_no_published_file_names_a_place_on_this_machine(hub, pushed):
    place = pushed["local_tied"]["place"]
    for name in CARDS:
        for path in hub.files(f"tester/{name}"):
            if path.endswith((".md", ".json")):
                assert place not in hub.read(f"tester/{name}", path).decode(), (name, path)


def test_every_card_says_what_is_tied_and_leaves_nothing_to_fill_in(cards):
    for name, text in cards.items():
        card = ModelCard(text)
        assert not re.search(r"more information needed|\bNone\b|\[\]\(|unknown dataset|model id", text, re.I), name
        assert "<!-- hf_tying:ties -->" in text and "<!-- hf_tying:load -->" in text, name
        tag = "weight-tying" if name in ("tied", "group", "projection", "twice", "tied-trainer", "from-folder") else (
            "tied-lora"
        )  # fmt: skip
        assert tag in card.data.tags and card.data.library_name, name
        assert f'"tester/{name}"' in text, name


def test_the_card_of_a_projection_in_a_stock_class_says_that_it_needs_this_package(cards):
    card = ModelCard(cards["projection"])
    assert card.data.library_name == "hf_tying" and "tying:projection" in card.data.tags
    assert "**another function**" in card.text and "run: plain" not in card.text


def test_what_was_written_by_hand_stays_and_a_second_push_changes_nothing(pushed, cards):
    card = ModelCard(cards["twice"])
    assert card.data.license == "mit" and card.text.count("## My notes\n\nBy hand.") == 1
    assert card.text.count("<!-- hf_tying:ties -->") == 1
    assert pushed["twice"]["same"]


def test_a_branch_has_its_own_card(hub, cards):
    assert "## Of main" in cards["peft"]
    assert "## Of main" not in hub.read("tester/peft", "README.md", "dev").decode()


def test_the_log_of_a_trainer_is_in_the_card(cards):
    assert re.search(r"\| 1 \| 5\.\d+ \|", cards["sft"])


def test_publish_runs_the_card_before_and_after_the_upload(hub, pushed):
    done = pushed["published"]["first"]
    assert done["repo_id"] == "tester/published" and done["blocks"] == 2
    assert done["files"].keys() == set(hub.files("tester/published"))
    assert done["questions"] == ["language", "datasets"] and done["url"].startswith(hub.address)
    card = ModelCard(hub.read("tester/published", "README.md").decode())
    assert card.data.license == "mit" and "weight-tying" in card.data.tags


def test_publish_goes_to_a_branch_or_a_pull_request_when_asked(hub, pushed):
    assert hub.files("tester/published-adapter") == []
    assert set(BOTH_FORMS) <= set(hub.files("tester/published-adapter", "dev"))
    assert "/discussions/1" in pushed["published"]["pull"]
