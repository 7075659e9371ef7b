"""`tying_report` of a live model: its figures are those of a plain count, whoever made or broke the ties."""

import pytest
import torch

from hf_tying import TyingError, tying_report, untie

from ..tiny import FULL_SCHEME, SEQ2SEQ, layer_pair, shared_names, split, tiny_model, untied_model
from .helpers import every_architecture, plain_count, tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_architecture
def test_the_figures_of_a_live_model_are_those_of_a_plain_count(arch, dtype):
    # BART's `shared` is no matrix of its own when the roles are: it stays with the source embedding.
    before = plain_count(untie(tied(arch, dtype=dtype)))
    model = tied(arch, dtype=dtype)
    report = tying_report(model)
    (group,) = report.groups
    assert report.parameters == plain_count(model)
    assert group.parameters_saved == before - report.parameters > 0
    assert group.bytes_saved == group.parameters_saved * dtype.itemsize
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[model.get_parameter(group.root)]
    one_matrix = sum(t.numel() * t.element_size() for t in (state["exp_avg"], state["exp_avg_sq"]))
    assert group.optimizer_bytes_saved == one_matrix * (len(set(group.roles.values())) - 1)
    assert sorted(group.names) == sorted(shared_names(model)[0])
    assert group.shape == list(model.get_parameter(group.root).shape)
    assert group.dtype == str(dtype).removeprefix("torch.")
    assert (group.declared, group.actual, group.in_file) == (True, True, None)
    expected = {"source", "target", "output"} if arch in SEQ2SEQ else {"target", "output"}
    assert set(group.roles.values()) == expected and set(group.roles) <= set(group.names)
    assert report.scheme == FULL_SCHEME[arch] and report.architecture == type(model).__name__


def test_an_untied_model_has_no_groups():
    model = untied_model("llama")
    for report in (tying_report(model), tying_report(untie(tied("llama")))):
        assert report.groups == [] and report.scheme in (None, "none")
        assert report.parameters == plain_count(model)
        assert report.to_dict()["parameters_saved"] == report.to_dict()["bytes_saved"] == 0
        assert "nothing is tied" in report.to_table()


def test_a_stock_model_is_reported_by_what_its_class_declares():
    model = tiny_model("bert", tie_word_embeddings=True)
    report = tying_report(model)
    assert sorted(map(sorted, shared_names(model))) == sorted(sorted(group.names) for group in report.groups)
    assert all(group.declared and group.actual for group in report.groups) and len(report.groups) == 2


def test_a_broken_tie_is_declared_but_not_so_and_saves_nothing():
    model = tied("llama")
    split(model, ["lm_head.weight"])
    report = tying_report(model)
    (group,) = report.groups
    assert (group.declared, group.actual) == (True, False)
    assert group.parameters_saved == group.bytes_saved == group.optimizer_bytes_saved == 0
    assert report.parameters == plain_count(model) and report.scheme == "none"
    assert group.status == "broken" and group.apart == ["lm_head.weight"] and not report.ok


def test_a_tie_that_is_partly_broken_saves_what_is_still_shared():
    model = tied("bart")
    split(model, ["lm_head.weight"])
    (group,) = tying_report(model).groups
    assert group.actual is False
    # Two roles still share, of three; `model.shared` is none.
    assert group.parameters_saved == model.lm_head.weight.numel()


def test_a_carrier_that_is_apart_costs_no_saving():
    model = tied("bart")
    split(model, ["model.shared.weight"])
    (group,) = tying_report(model).groups
    assert group.actual is False
    assert group.parameters_saved == 2 * model.lm_head.weight.numel()  # the three roles share still


def test_a_tie_that_nobody_declared_is_shown_as_such():
    model = tied("llama")
    first, second = layer_pair(model)
    path, _, attribute = second.rpartition(".")
    setattr(model.get_submodule(path), attribute, model.get_parameter(first))
    by_declared = {group.declared: group for group in tying_report(model).groups}
    assert sorted(by_declared[False].names) == sorted([first, second]) and by_declared[False].actual
    assert by_declared[True].names == ["model.embed_tokens.weight", "lm_head.weight"]


def test_wrappers_are_looked_through():
    from peft import LoraConfig, get_peft_model

    model = tied("llama")
    expected = tying_report(model).groups
    assert tying_report(torch.compile(model)).groups == expected
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    assert tying_report(adapted).groups == expected


def test_something_else_than_a_model_is_refused():
    with pytest.raises(TyingError, match="Linear"):
        tying_report(torch.nn.Linear(2, 2))
