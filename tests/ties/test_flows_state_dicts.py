"""f07, f08, f09: copies, state dicts, `assign`, `to_empty` and conversions leave one parameter, or are refused."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file

from hf_tying import TyingError, assert_tied

from ..forms import picklable, tied_model
from ..tiny import logits

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


class TestCopiesAndStateDicts:
    """f07: deepcopy, pickle, torch.save, load_state_dict, safetensors."""

    def test_deepcopy_and_pickle_keep_one_parameter(self, model):
        for twin in (copy.deepcopy(model), *([pickle.loads(pickle.dumps(model))] if picklable(model) else [])):
            assert_tied(twin)
            assert twin.lm_head.weight is twin.transformer.wte.weight is not model.lm_head.weight
            assert torch.equal(logits(twin), logits(model))

    def test_torch_save_of_the_whole_model_keeps_one_parameter(self, tmp_path):
        model = tied_model("in place")
        torch.save(model, tmp_path / "model.pt")
        assert_tied(torch.load(tmp_path / "model.pt", weights_only=False))

    def test_a_state_dict_with_conflicting_values_is_refused_and_nothing_is_loaded(self, model):
        before = logits(model)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        state[HEAD] = state[HEAD] + 1
        state["transformer.ln_f.weight"] = torch.zeros_like(state["transformer.ln_f.weight"])
        with pytest.raises(TyingError, match="Cannot load this state dict"):
            model.load_state_dict(state)
        assert torch.equal(logits(model), before)

    def test_a_wrapper_that_loads_conflicting_values_is_refused_too(self, model):
        wrapper = torch.nn.ModuleDict({"inner": model})
        state = {name: value.clone() for name, value in wrapper.state_dict().items()}
        state[f"inner.{HEAD}"] = state[f"inner.{HEAD}"] + 1
        with pytest.raises(TyingError, match="Cannot load this state dict"):
            wrapper.load_state_dict(state)

    @pytest.mark.parametrize("kept", [WTE, HEAD])
    def test_any_one_name_of_a_group_in_a_state_dict_is_enough(self, model, kept):
        state = {name: t for name, t in model.state_dict().items() if name not in (WTE, HEAD) or name == kept}
        state[kept] = state[kept] + 1
        assert model.load_state_dict(state).missing_keys == []
        assert_tied(model)
        assert torch.equal(model.lm_head.weight, state[kept])

    def test_safetensors_says_itself_that_names_share_memory(self, model, tmp_path):
        with pytest.raises(RuntimeError, match="Some tensors share memory"):
            save_file(model.state_dict(), tmp_path / "state.safetensors")


class TestAssignedAndEmptied:
    """f08: load_state_dict(assign=True), to_empty, .to("meta")."""

    def test_assign_leaves_one_parameter_and_adamw_steps_it_once(self, model):
        reference = copy.deepcopy(model)
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        assert_tied(model)
        for twin in (model, reference):
            optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                twin(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
                optimizer.step()
        assert torch.equal(logits(model), logits(reference))

    def test_assign_of_a_part_of_the_names_fills_the_rest(self, model):
        state = {name: t.clone() for name, t in model.state_dict().items() if name != HEAD}
        model.load_state_dict(state, assign=True)
        assert_tied(model)

    @pytest.mark.parametrize(
        "move", [lambda m: m.to("meta"), lambda m: m.to_empty(device="cpu")], ids=["meta", "empty"]
    )
    def test_a_model_moved_to_meta_or_emptied_has_one_parameter_again(self, model, move):
        move(model)
        assert model.lm_head.weight is model.transformer.wte.weight


class TestDtypes:
    """f09: conversions."""

    @pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_conversion_keeps_one_parameter_even_when_torch_makes_new_ones(self, model, convert, overwrite):
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        try:
            getattr(model, convert)()
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
        assert_tied(model)

    def test_a_conversion_inside_a_module_list_keeps_one_parameter(self, model):
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            torch.nn.ModuleList([model]).double()
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
        assert_tied(model)
