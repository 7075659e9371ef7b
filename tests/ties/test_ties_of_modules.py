"""Ties of a plain `nn.Module`: made, kept, checked, saved and loaded; beside the same module tied by hand."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hf_tying import TyingConfig, TyingError, assert_tied, load_tied, names_of, save_tied, tie, tying_report, untie

PAIR = ["embedding.weight", "head.weight"]


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.register_buffer("count", torch.zeros(20, 8))

    def forward(self, ids):
        return self.head(self.second(self.first(self.embedding(ids))))


class WithRoles(Plain):
    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = tied()
        self.further = nn.Linear(8, 20, bias=False)


def tied(save_format=None):
    groups = {"words": PAIR, "layers": ["first", "second"]}
    return tie(Plain(), TyingConfig(groups=groups, save_format=save_format), init_from="mean")


def by_hand(module):
    """The stock control: the same ties, made by assignment."""
    module.head.weight = module.embedding.weight
    module.second = module.first
    return module


def is_tied(module):
    return module.head.weight is module.embedding.weight and module.second.weight is module.first.weight


def test_a_tied_module_trains_as_one_tied_by_hand():
    ours = tied()
    stock = by_hand(Plain())
    stock.load_state_dict(ours.state_dict())
    ids, losses = torch.arange(6)[None], []
    for module in (ours, stock):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(ids)[0], ids[0])
            loss.backward()
            optimizer.step()
        losses.append(loss)
    assert torch.equal(*losses)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert_tied(ours)


FLOWS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "to": lambda module: module.to(torch.float64).to(torch.float32),
    "average": lambda module: AveragedModel(module).module,
}


@pytest.mark.parametrize("flow", FLOWS)
def test_a_flow_keeps_the_tie_and_its_record(flow):
    module = FLOWS[flow](tied())
    assert is_tied(module)
    assert_tied(module)
    assert [group.names for group in module.tie_groups] == [group.names for group in tied().tie_groups]
    state = {key: torch.ones_like(value) for key, value in module.state_dict().items() if key != "embedding.weight"}
    module.load_state_dict(state, assign=True)  # the hooks are there as well
    assert is_tied(module) and bool((module.embedding.weight == 1).all())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("left_out", [*PAIR, "second.bias"])
def test_a_state_dict_needs_one_name_of_a_group(left_out, assign):
    module = tied()
    state = {key: value.clone() + 1 for key, value in module.state_dict().items() if key != left_out}
    module.load_state_dict(state, assign=assign)
    assert is_tied(module)
    assert torch.equal(module.embedding.weight, state.get("head.weight", state.get("embedding.weight")))


def test_a_state_dict_with_two_values_is_refused_and_nothing_changes():
    module = tied()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for tied_one in (module, copy.deepcopy(module)):
        with pytest.raises(TyingError, match="different values"):
            tied_one.load_state_dict(Plain().state_dict())
        assert all(torch.equal(value, before[key]) for key, value in tied_one.state_dict().items())


def test_a_broken_tie_is_told_and_its_way_out_mends_it():
    module = tied()
    module.head.weight = nn.Parameter(module.embedding.weight.detach().clone())
    with pytest.raises(TyingError, match=r"tie\(model, \['embedding.weight', 'head.weight'\]\)"):
        assert_tied(module)
    assert_tied(tie(module, PAIR))


def test_a_broken_tie_is_not_saved(tmp_path):
    module = tied()
    module.head.weight = nn.Parameter(torch.zeros(20, 8))
    with pytest.raises(TyingError, match="Cannot save Plain"):
        save_tied(module, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_to_empty_breaks_the_tie_as_in_torch_and_is_told():
    with pytest.raises(TyingError, match="meta device"):
        assert_tied(tied().to_empty(device="meta"))


def test_untie_takes_one_name_or_all_out():
    module = untie(tied(), "second")
    assert module.first.weight is not module.second.weight and module.head.weight is module.embedding.weight
    assert [group.name for group in module.tie_groups] == ["words"]
    assert_tied(module)
    untie(module)
    assert module.tie_groups == [] and module.head.weight is not module.embedding.weight
    assert_tied(module)


def test_a_name_untied_in_the_outer_module_leaves_the_record_inside():
    outer = tie(Outer(), ["further.weight", "inner.head.weight"], init_from="inner.head.weight")
    assert outer.further.weight is outer.inner.embedding.weight
    untie(outer, ["inner.head.weight"])
    assert_tied(outer)
    assert_tied(outer.inner)


REFUSED = {
    "a buffer": (["embedding.weight", "count"], "is a buffer"),
    "another shape": (["embedding.weight", "first.weight"], "shape"),
    "an unknown name": (["embedding.weight", "haed.weight"], "nearest names are 'head.weight'"),
    "no values chosen": (PAIR, "init_from"),
    "a scheme": ("two_way", r"Name the parameters instead: tie\(model"),
    "a loss": (TyingConfig(groups={"words": PAIR}, loss="tied"), "'loss'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tied_is_refused_before_anything_changes(case):
    ties, message = REFUSED[case]
    module = Plain()
    before = dict(module.named_parameters())
    with pytest.raises(TyingError, match=message):
        tie(module, ties)
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    assert not hasattr(module, "tie_groups")


def test_the_way_out_of_a_scheme_names_matrices_of_the_module_that_fit():
    module = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 4), nn.Linear(4, 20))
    with pytest.raises(TyingError, match=r"tie\(model, \['0.weight', '2.weight'\]\)"):
        tie(module, "two_way")
    assert_tied(tie(module, ["0.weight", "2.weight"], init_from="0.weight"))


def test_a_wrapper_is_told_to_be_tied_before():
    with pytest.raises(TyingError, match="tie the Plain inside it"):
        tie(nn.DataParallel(Plain()), PAIR)
    assert_tied(nn.DataParallel(tied()))


def test_accessors_give_a_module_its_roles():
    module = tie(WithRoles(), "two_way", init_from="output")
    assert names_of(module, module.head.weight) == PAIR
    assert [(group.names, group.actual) for group in tying_report(module).groups] == [(PAIR, True)]


@pytest.mark.parametrize("save_format", ["portable", "dedup"])
def test_a_folder_gives_the_ties_back(save_format, tmp_path):
    module = tied(save_format)
    save_tied(module, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "tying.json"]
    stored = load_file(tmp_path / "model.safetensors")
    assert ("head.weight" in stored) == ("second.bias" in stored) == (save_format == "portable")
    with torch.device("meta"):
        blank = Plain()
    for again in (Plain(), by_hand(Plain()), blank, tied()):
        assert load_tied(again, tmp_path) is again
        assert_tied(again)
        assert again.head.weight is again.embedding.weight
        assert all(torch.equal(value, module.state_dict()[key]) for key, value in again.state_dict().items())
    if save_format == "portable":  # a loader that knows nothing of ties
        stock = Plain()
        load_model(stock, tmp_path / "model.safetensors")
        assert torch.equal(stock(torch.arange(5)), module(torch.arange(5)))


def test_ties_made_by_hand_are_recorded(tmp_path):
    save_tied(by_hand(Plain()), tmp_path)
    assert is_tied(load_tied(Plain(), tmp_path))


def test_what_the_record_does_not_tie_is_loaded_untied(tmp_path):
    module = Plain()
    save_tied(module, tmp_path)
    again = load_tied(tied(), tmp_path)
    assert not is_tied(again)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in again.state_dict().items())


def test_names_are_those_of_the_module_inside_a_wrapper(tmp_path):
    module = tied()
    save_tied(nn.DataParallel(module), tmp_path)
    again = load_tied(nn.DataParallel(Plain()), tmp_path).module
    assert is_tied(again)
    assert torch.equal(again.first.weight, module.first.weight)


@pytest.fixture
def conflict(tmp_path):
    save_tied(tied(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["head.weight"] = tensors["head.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, tensors


def test_values_that_differ_are_refused_and_nothing_changes(conflict):
    folder, _ = conflict
    module = Plain()
    before = {name: (parameter, parameter.clone()) for name, parameter in module.named_parameters()}
    with pytest.raises(TyingError, match=r"load_tied\(module, folder, on_conflict=...\).*'use:embedding.weight'"):
        load_tied(module, folder)
    for name, parameter in module.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("chosen", PAIR)
def test_a_choice_takes_one_value_for_all(conflict, chosen):
    folder, tensors = conflict
    module = load_tied(Plain(), folder, on_conflict=f"use:{chosen}")
    assert is_tied(module) and torch.equal(module.head.weight, tensors[chosen])


def test_a_choice_keeps_both(conflict):
    folder, tensors = conflict
    module = load_tied(Plain(), folder, on_conflict="keep_untied")
    assert_tied(module)
    assert [group.root for group in module.tie_groups] == ["first.weight", "first.bias"]
    assert all(torch.equal(module.get_parameter(name), tensors[name]) for name in PAIR)


def with_record(folder, **changes):
    entry = json.loads((folder / "tying.json").read_text())
    (folder / "tying.json").write_text(json.dumps(entry | changes))


def with_tensors(folder, **changes):
    tensors = load_file(folder / "model.safetensors")
    tensors = {key: value for key, value in (tensors | changes).items() if value is not None}
    save_file(tensors, folder / "model.safetensors")


BROKEN = {
    "no record": (lambda folder: (folder / "tying.json").unlink(), "tying.json"),
    "no JSON": (lambda folder: (folder / "tying.json").write_text("{"), "cannot be read as JSON"),
    "a deep record": (lambda folder: (folder / "tying.json").write_text("[" * 100_000), "JSON"),
    "a newer record": (lambda folder: with_record(folder, version=2), "Upgrade"),
    "an unknown name": (lambda folder: with_record(folder, groups={"a": ["head.weight", "os.system"]}), "os.system"),
    "a pattern": (lambda folder: with_record(folder, groups={"a": ["head.weight", ".*"]}), "does not exist"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read: No such file"),
    "a header of any size": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x00" + b"{}"),
        "cannot be read as safetensors",
    ),
    "a missing tensor": (lambda folder: with_tensors(folder, count=None), "lacks 'count'"),
    "a group without tensors": (
        lambda folder: with_tensors(folder, **{"first.bias": None, "second.bias": None}),
        "lacks 'first.bias'",
    ),
    "a further tensor": (lambda folder: with_tensors(folder, more=torch.zeros(1)), "has 'more'"),
    "another shape": (lambda folder: with_tensors(folder, count=torch.zeros(3)), r"shape \(3,\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_and_nothing_changes(case, tmp_path):
    breaks, message = BROKEN[case]
    save_tied(tied(), tmp_path)
    breaks(tmp_path)
    module = Plain()
    before = {name: (parameter, parameter.clone()) for name, parameter in module.named_parameters()}
    with pytest.raises(TyingError, match=message):
        load_tied(module, tmp_path)
    assert not hasattr(module, "tie_groups")
    for name, parameter in module.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


def test_a_record_of_any_size_is_not_read(tmp_path, monkeypatch):
    save_tied(tied(), tmp_path)
    monkeypatch.setattr("hf_tying.ties.headers.LARGEST_INDEX", 100)
    with pytest.raises(TyingError, match="more than 100 are not read"):
        load_tied(Plain(), tmp_path)


def test_a_save_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    module = tied()
    save_tied(module, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("json.dumps", full)
    with torch.no_grad():
        module.first.weight += 1
    with pytest.raises(OSError, match="No space"):
        save_tied(module, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
