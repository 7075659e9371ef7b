"""f21: a published custom class loads tied by `trust_remote_code` where this package is not installed."""

import ast
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_tying import assert_tied, tie, tying_report
from hf_tying.ties.remote_code import carried_modules

from ..engines import different
from ..processes import run_python
from ..tiny import shared_names

# What a user writes in a file of their own. Two forms of the same import, and a helper module beside it.
MODELING = '''
"""A little tied language model."""

from transformers import LlamaConfig, LlamaForCausalLM

from hf_tying import (
    TiedModelMixin,
    TyingConfigMixin as ConfigMixin,
    TyingError,
)

from .helper_house import WORD


class HouseConfig(ConfigMixin, LlamaConfig):
    model_type = "house_llama"


class HouseForCausalLM(TiedModelMixin, LlamaForCausalLM):
    config_class = HouseConfig

    def greet(self):
        return WORD, issubclass(TyingError, ValueError)
'''
HELPER = "WORD = 'house'\n"

ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_tying":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import hf_tying
except ModuleNotFoundError:
    pass
else:
    sys.exit("the package is there")
"""

CHILD = """
import json, pathlib
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

found, values = {}, {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    if not (folder / "config.json").is_file():
        continue
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        names = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        model.eval()
        with torch.no_grad():
            values[folder.name] = model(torch.arange(8)[None]).logits
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        model.save_pretrained(folder / "again")
        again = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True)
        found[folder.name] = {
            "class": type(model).__name__, "module": type(model).__module__, "greet": model.greet(),
            "missing": sorted(info["missing_keys"]), "shared": [n for n in names.values() if len(n) > 1],
            "entry": model.config.tying,
            "tied after a step and a file": again.lm_head.weight is again.model.embed_tokens.weight,
        }
    except Exception as error:
        found[folder.name] = {"error": f"{type(error).__name__}: {error}"}
assert "hf_tying" not in sys.modules
save_file(values, sys.argv[2])
print(json.dumps(found))
"""


def run_without_the_package(program: str, folder: Path, *arguments) -> dict:
    """What `program` prints as JSON in its last line."""
    done = run_python("-c", ABSENT + program, folder, *arguments, cwd=folder, environment={"PYTHONPATH": None})
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The user's module, imported from a folder that is no package of ours."""
    package = tmp_path_factory.mktemp("source") / "house"
    package.mkdir()
    for name, text in {"__init__": "", "modeling_house": MODELING, "helper_house": HELPER}.items():
        (package / f"{name}.py").write_text(text)
    sys.path.insert(0, str(package.parent))
    try:
        yield importlib.import_module("house.modeling_house")
    finally:
        sys.path.remove(str(package.parent))
        for name in [name for name in sys.modules if name.partition(".")[0] == "house"]:
            del sys.modules[name]


LAYERS = {"layers": ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]}
ENTRIES = {
    "dedup": {"version": 1, "scheme": "two_way", "save_format": "dedup"},
    "portable": {"version": 1, "scheme": "two_way", "save_format": "portable"},
    "layers": {"version": 1, "scheme": "two_way", "groups": LAYERS},
    "shared layers": {
        "version": 2,
        "scheme": "two_way",
        "depth": [{"path": "model.layers", "order": [0, 0], "damped": [1], "relax": {"kind": "lora", "rank": 2}}],
        "save_format": "portable",
    },
    "relaxed": {
        "version": 2,
        "scheme": "two_way",
        "groups": {"layers": {"names": LAYERS["layers"], "relax": {"kind": "scale"}}},
    },
}


#: How many groups each holds: the embeddings, and layers, one by one.
GROUPS = {"dedup": 1, "portable": 1, "layers": 2, "shared layers": 10, "relaxed": 2}


def build(house, entry):
    house.HouseConfig.register_for_auto_class()
    house.HouseForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    torch.manual_seed(0)
    config = house.HouseConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False, tying=entry,
    )  # fmt: skip
    return different(house.HouseForCausalLM(config)).eval()


@pytest.fixture(scope="module")
def published(house, tmp_path_factory):
    """Models of the user's class, saved; and what a process without the package makes of them."""
    work = tmp_path_factory.mktemp("published")
    models = {name: build(house, entry) for name, entry in ENTRIES.items()}
    for name, model in models.items():
        model.save_pretrained(work / name)
    models["portable"].save_pretrained(work / "conflict")
    tensors = load_file(work / "conflict" / "model.safetensors")
    tensors["lm_head.weight"] += 1.0
    save_file(tensors, work / "conflict" / "model.safetensors", {"format": "pt"})
    found = run_without_the_package(CHILD, work, work / "logits.safetensors")
    return work, models, found, load_file(work / "logits.safetensors")


@pytest.mark.parametrize("name", ENTRIES)
def test_without_the_package_the_class_loads_tied_and_computes_the_same(published, name):
    _, models, found, values = published
    model, there = models[name], found[name]
    assert "error" not in there, there["error"]
    assert there["class"] == "HouseForCausalLM" and there["module"].startswith("transformers_modules")
    assert there["greet"] == ["house", True] and there["missing"] == []
    assert there["shared"] == shared_names(model) and len(there["shared"]) == GROUPS[name]
    assert there["entry"] == model.config.tying
    with torch.no_grad():
        assert torch.equal(values[name], model(torch.arange(8)[None]).logits)


@pytest.mark.parametrize("name", ENTRIES)
def test_without_the_package_the_tie_holds_through_a_step_and_another_file(published, name):
    assert published[2][name]["tied after a step and a file"] is True


def test_the_copied_files_import_nothing_of_the_package(published):
    work = published[0]
    copied = {path.name: path.read_text() for path in (work / "dedup").glob("*.py")}
    assert {"modeling_house.py", "helper_house.py", "hf_tying_ties_modeling.py", "hf_tying_config.py"} <= set(copied)
    for name, text in copied.items():
        assert not [line for line in text.splitlines() if line.startswith(("from hf_tying", "import hf_tying"))], name
    config = json.loads((work / "dedup" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_house.HouseForCausalLM"


def test_the_users_own_source_is_not_touched(house, published):
    source = Path(house.__file__)
    assert source.read_text() == MODELING
    assert not list(source.parent.glob("hf_tying_*"))


def test_with_the_package_the_same_folder_loads_and_is_reported(house, published, tmp_path):
    work, models, _, values = published
    loaded = house.HouseForCausalLM.from_pretrained(work / "layers").eval()
    assert_tied(loaded)
    assert shared_names(loaded) == shared_names(models["layers"])
    with torch.no_grad():
        assert torch.equal(loaded(torch.arange(8)[None]).logits, values["layers"])
    report = tying_report(work / "layers")
    assert {group.name: group.names for group in report.groups} == models["layers"].config.tying["groups"]


def test_a_conflict_in_the_file_is_an_error_without_the_package_too(published):
    error = published[2]["conflict"]["error"]
    assert error.startswith("TyingError") and "on_conflict" in error and "largest difference 1 " in error


def test_a_stock_model_made_tied_by_tie_carries_no_code(tmp_path):
    from ..tiny import untied_model

    tie(untied_model("llama"), "two_way", init_from="target").save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_saving_twice_into_one_folder_keeps_it_loadable(house, tmp_path):
    model = build(house, ENTRIES["dedup"])
    model.save_pretrained(tmp_path)
    first = {path.name: path.read_text() for path in tmp_path.glob("*.py")}
    model.save_pretrained(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.glob("*.py")} == first


def test_every_carried_module_is_there_and_imports_only_carried_ones():
    """The package's own modules that a published class needs do not grow an import that is left behind."""
    carried = carried_modules()
    flat = {"hf_tying_" + module.replace(".", "_") for module in carried}
    assert {"config", "ties.modeling", "ties.tying", "projection.model"} <= set(carried)
    for module, text in carried.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in flat, f"{module}: {ast.unparse(node)}"
            elif isinstance(node, ast.ImportFrom | ast.Import):
                assert "hf_tying" not in ast.unparse(node), f"{module}: {ast.unparse(node)}"


LSTM_CHILD = """
import json
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/lstm", trust_remote_code=True).eval()
classifier = AutoModelForSequenceClassification.from_pretrained(f"{sys.argv[1]}/classifier", trust_remote_code=True)
assert "hf_tying" not in sys.modules
ids = torch.arange(8)[None]
output = model(input_ids=ids, labels=ids)
model.train()(input_ids=ids, labels=ids).loss.backward()
found = {
    "module": type(model).__module__,
    "loss": float(output.loss),
    "tied": model.lm_head.weight is model.lstm.embed_tokens.weight,
    "parameters": model.num_parameters(),
    "parts": sorted(model.loss_parts),
    "generated": model.eval().generate(ids, max_new_tokens=4, do_sample=False).shape[1],
    "classes": classifier(ids).logits.tolist(),
}
print(json.dumps(found))
"""


def test_the_lstm_and_its_classifier_are_published_with_their_code(tmp_path, monkeypatch):
    """`register_for_auto_class`: the folder needs transformers alone, tied, with its projection (PR)."""
    from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM, TiedLSTMForSequenceClassification

    for cls in (TiedLSTMConfig, TiedLSTMForCausalLM, TiedLSTMForSequenceClassification):
        monkeypatch.setattr(cls, "_auto_class", None)
    TiedLSTMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
    TiedLSTMConfig.register_for_auto_class()
    TiedLSTMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    tying = {"version": 1, "scheme": "two_way", "projection": {}}
    model = TiedLSTMForCausalLM(TiedLSTMConfig(vocab_size=30, embedding_size=6, hidden_size=6, tying=tying)).eval()
    model.save_pretrained(tmp_path / "lstm")
    config = TiedLSTMConfig(vocab_size=30, embedding_size=6, hidden_size=6, num_labels=3)
    classifier = TiedLSTMForSequenceClassification(config).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    ids = torch.arange(8)[None]
    found = run_without_the_package(LSTM_CHILD, tmp_path)
    torch.testing.assert_close(torch.tensor(found["classes"]), classifier(ids).logits)
    assert found["module"].startswith("transformers_modules.")
    assert found["loss"] == pytest.approx(float(model(input_ids=ids, labels=ids).loss.detach()), rel=1e-5)
    assert found["tied"] and found["parameters"] == model.num_parameters() and found["generated"] == 12
    assert found["parts"] == ["cross_entropy", "projection"]
