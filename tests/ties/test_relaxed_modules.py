"""Relaxed groups of a plain module: filters of convolutions, saved and loaded."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_tying import (
    TyingError,
    assert_tied,
    gap,
    harden,
    load_tied,
    save_tied,
    tie,
    untie,
)

from .relaxed_models import each_kind


class Filters(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(2, 2, 3) for _ in range(3))

    def forward(self, image):
        return self.third(self.second(self.first(image)))


FILTERS = ["first.weight", "second.weight", "third.weight"]


@each_kind
class TestAPlainModule:
    def module(self, relax):
        torch.manual_seed(0)
        module = tie(Filters(), {"filters": {"names": FILTERS, "relax": relax}}, init_from="first.weight")
        for name, parameter in module.named_parameters():
            if "relaxation" in name:
                torch.nn.init.normal_(parameter)
        return module

    def test_is_saved_and_loaded(self, relax, tmp_path):
        module, image = self.module(relax), torch.randn(1, 2, 9, 9)
        save_tied(module, tmp_path)
        loaded = load_tied(Filters(), tmp_path)
        assert_tied(loaded)
        assert torch.equal(loaded(image), module(image)) and gap(loaded) == gap(module)
        stock = Filters()
        stock.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        torch.testing.assert_close(stock(image), module(image), atol=1e-5, rtol=1e-5)

    def test_a_value_that_another_program_has_changed_is_refused_or_dropped_as_chosen(self, relax, tmp_path):
        module, image = self.module(relax), torch.randn(1, 2, 9, 9)
        save_tied(module, tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        save_file({**tensors, "second.weight": tensors["second.weight"] + 0.1}, tmp_path / "model.safetensors")
        with pytest.raises(
            TyingError, match="'second.weight' that is not what its difference makes of 'first.weight'"
        ):
            load_tied(Filters(), tmp_path)
        loaded = load_tied(Filters(), tmp_path, on_conflict="use:first.weight")
        assert torch.equal(loaded(image), module(image))

    def test_a_name_is_untied_alone(self, relax):
        module, image = self.module(relax), torch.randn(1, 2, 9, 9)
        before = module(image)
        untie(module, ["second.weight"])
        assert_tied(module)
        assert list(gap(module)["filters"]) == ["third.weight"]
        torch.testing.assert_close(module(image), before, atol=1e-5, rtol=1e-5)

    def test_a_file_that_does_not_fit_changes_nothing(self, relax, tmp_path):
        save_tied(self.module(relax), tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        save_file({**tensors, "other": torch.zeros(1)}, tmp_path / "model.safetensors")
        target = Filters()
        before = {name: value.clone() for name, value in target.state_dict().items()}
        with pytest.raises(TyingError, match="'other'"):
            load_tied(target, tmp_path)
        assert before.keys() == target.state_dict().keys() and type(target.second) is nn.Conv2d
        assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_members_share_the_filters_of_a_basis():
    module = tie(
        Filters(), {"filters": {"names": FILTERS, "relax": {"kind": "basis", "filters": 1}}}, init_from="first.weight"
    )
    assert module.second.weight_relaxation.filters is module.third.weight_relaxation.filters
    assert module.second.weight_relaxation.coefficients is not module.third.weight_relaxation.coefficients


def test_a_root_that_leaves_is_refused_until_the_group_is_exact():
    module = tie(Filters(), {"filters": {"names": FILTERS, "relax": {"kind": "scale"}}}, init_from="first.weight")
    with pytest.raises(TyingError, match="harden"):
        untie(module, ["first.weight"])
    untie(harden(module), ["first.weight"])
