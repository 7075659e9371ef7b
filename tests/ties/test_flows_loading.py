"""What a user does with files and state dicts: each flow that transformers breaks silently holds, or says so."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel

from hf_tying import TyingConfig, TyingError, assert_tied, tie, untie

from ..forms import matrix, reload, stock_class, tied_model
from ..tiny import logits, tiny_model

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


def rewrite(folder, change):
    """Change the tensors of a saved model by `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def set_entry(folder, **changes):
    """Change the `tying` entry in config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["tying"].update(changes)
    path.write_text(json.dumps(config))


@pytest.fixture
def conflicting(model, tmp_path):
    """The folder of a model tied in its config, whose file holds two different matrices."""
    model.save_pretrained(tmp_path)

    def change(tensors):
        tensors[HEAD] = tensors[WTE] + 1.0

    rewrite(tmp_path, change)
    return tmp_path


class TestConflictingValues:
    """f01: a checkpoint with two different matrices under a config that ties them."""

    def test_loading_names_the_difference_and_the_ways_out(self, model, conflicting):
        with pytest.raises(TyingError, match="largest difference 1 at") as error:
            reload(model, conflicting)
        for way_out in ("use:transformer.wte.weight", "use:lm_head.weight", "keep_untied"):
            assert way_out in str(error.value)

    def test_keep_untied_keeps_both_and_corrects_the_config(self, model, conflicting):
        set_entry(conflicting, on_conflict="keep_untied")
        loaded = reload(model, conflicting)
        assert not torch.equal(matrix(loaded, "output"), matrix(loaded, "target"))
        assert loaded.config.tying["scheme"] == "none" and loaded.config.tie_word_embeddings is False
        assert_tied(loaded)

    @pytest.mark.parametrize("call", ["tie_weights", "resize_token_embeddings"])
    def test_nothing_that_is_called_later_overwrites_a_matrix_kept_untied(self, model, conflicting, call):
        set_entry(conflicting, on_conflict="keep_untied")
        loaded = reload(model, conflicting)
        head = matrix(loaded, "output").detach().clone()
        loaded.tie_weights() if call == "tie_weights" else loaded.resize_token_embeddings(70)
        assert torch.equal(matrix(loaded, "output")[:64], head)

    @pytest.mark.parametrize("name, offset", [(WTE, 0.0), (HEAD, 1.0)])
    def test_use_takes_the_named_matrix_for_all(self, model, conflicting, name, offset):
        set_entry(conflicting, on_conflict=f"use:{name}")
        loaded = reload(model, conflicting)
        assert_tied(loaded)
        assert torch.equal(matrix(loaded, "target"), matrix(model, "target") + offset)

    def test_the_entry_can_be_chosen_in_the_call(self, model, conflicting):
        entry = {**model.config.tying, "on_conflict": f"use:{HEAD}"}
        loaded = reload(model, conflicting, tying=entry)
        assert torch.equal(matrix(loaded, "target"), matrix(model, "target") + 1.0)

    def test_use_of_a_name_outside_the_conflict_is_refused(self, model, conflicting):
        set_entry(conflicting, on_conflict="use:transformer.wpe.weight")
        with pytest.raises(TyingError, match="the conflict is between"):
            reload(model, conflicting)


class TestOpenedUntied:
    """f02: a checkpoint written tied, opened with tie_word_embeddings=False."""

    def test_the_contradiction_is_refused_with_the_way_to_open_it_untied(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        with pytest.raises(TyingError, match="load it as it is, then untie"):
            reload(model, tmp_path, tie_word_embeddings=False)

    def test_a_stock_file_opened_by_the_class_form_gets_a_copy_not_a_random_head(self, tmp_path):
        stock = tiny_model("gpt2")  # tied by its class, one matrix in the file
        stock.save_pretrained(tmp_path)
        loaded = type(tied_model("class form")).from_pretrained(tmp_path, tie_word_embeddings=False)
        assert loaded.lm_head.weight is not loaded.transformer.wte.weight
        assert torch.equal(logits(loaded), logits(stock))


def test_sharded_save_of_a_tied_model_reloads_tied(model, tmp_path):  # f03
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = reload(model, tmp_path)
    assert_tied(loaded)
    assert torch.equal(logits(loaded), logits(model))


class TestTiedByHand:
    """f04: `lm_head.weight = wte.weight` with the flag off."""

    def test_tie_takes_it_over_and_the_file_holds_it(self, tmp_path):
        model = tiny_model("gpt2", tie_word_embeddings=False)
        model.lm_head.weight = model.transformer.wte.weight
        tie(model, "two_way").save_pretrained(tmp_path)
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
        assert_tied(loaded)
        assert torch.equal(logits(loaded), logits(model))

    def test_by_hand_on_a_model_that_is_held_untied_is_refused_at_the_save(self, model, tmp_path):
        untie(model)
        model.lm_head.weight = model.transformer.wte.weight
        with pytest.raises(TyingError, match="are one parameter, but no group declares it"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestTiedLayers:
    """f05: two MLP layers as one."""

    NAMES = ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.weight"]

    @pytest.mark.parametrize("flag", [True, False])
    def test_they_save_and_reload_tied_whatever_the_embeddings_do(self, form, flag, tmp_path):
        model = tied_model(form, spec="two_way" if flag else "none")
        tie(model, self.NAMES, init_from=self.NAMES[0])
        assert model.config.tie_word_embeddings is flag
        model.save_pretrained(tmp_path)
        loaded = reload(model, tmp_path)
        assert_tied(loaded)
        assert loaded.get_parameter(self.NAMES[0]) is loaded.get_parameter(self.NAMES[1])
        assert torch.equal(logits(loaded), logits(model))

    def test_the_file_is_portable_every_name_is_in_it(self, model, tmp_path):
        tie(model, self.NAMES, init_from=self.NAMES[0])
        model.save_pretrained(tmp_path)
        assert set(self.NAMES) <= load_file(tmp_path / "model.safetensors").keys()


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
        state = model.state_dict()
        state[HEAD] = state[HEAD] + 1
        state["transformer.ln_f.weight"] = torch.zeros_like(state["transformer.ln_f.weight"])
        with pytest.raises(TyingError, match="Cannot load this state dict"):
            model.load_state_dict(state)
        assert torch.equal(logits(model), before)

    def test_a_wrapper_that_loads_it_is_refused_too(self, model):
        wrapper = torch.nn.ModuleDict({"inner": model})
        state = wrapper.state_dict()
        state[f"inner.{HEAD}"] = state[f"inner.{HEAD}"] + 1
        with pytest.raises(TyingError, match="Cannot load this state dict"):
            wrapper.load_state_dict(state)

    @pytest.mark.parametrize("kept", [WTE, HEAD])
    def test_any_one_name_is_enough(self, model, kept):
        state = {name: t for name, t in model.state_dict().items() if name not in (WTE, HEAD) or name == kept}
        state[kept] = state[kept] + 1
        assert model.load_state_dict(state).missing_keys == []
        assert_tied(model)
        assert torch.equal(model.lm_head.weight, state[kept])

    def test_safetensors_says_itself_that_names_share_memory(self, model, tmp_path):
        with pytest.raises(RuntimeError, match="Some tensors share memory"):
            save_file(model.state_dict(), tmp_path / "state.safetensors")


def picklable(model) -> bool:
    """The class form here is made on the fly, which pickle cannot find by name; a user's class lies in a module."""
    return type(model).__module__.startswith("transformers.")


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
    def test_new_tensors_are_one_parameter_again(self, model, move):
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

    def test_inside_a_module_list_too(self, model):
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            torch.nn.ModuleList([model]).double()
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
        assert_tied(model)


class TestPartsOfAFile:
    """f11: files with one name only, and values that almost agree."""

    @pytest.mark.parametrize("kept", [WTE, HEAD])
    def test_a_file_with_any_one_name_loads_tied(self, model, tmp_path, kept):
        model.save_pretrained(tmp_path)
        rewrite(tmp_path, lambda tensors: tensors.update({kept: tensors.pop(WTE)}))
        loaded, info = reload(model, tmp_path, output_loading_info=True)
        assert_tied(loaded)
        assert not info["missing_keys"]
        assert torch.equal(logits(loaded), logits(model))

    def test_a_base_model_whose_matrix_lies_under_the_head_is_refused(self, tmp_path):
        tied_model("in place").save_pretrained(tmp_path)
        rewrite(tmp_path, lambda tensors: tensors.update({HEAD: tensors.pop(WTE)}))
        with pytest.raises(TyingError, match="Load it as GPT2LMHeadModel and take `.base_model`"):
            AutoModel.from_pretrained(tmp_path)

    def test_a_base_model_reads_the_file_as_this_package_writes_it(self, tmp_path):
        model = tied_model("in place")
        tie(model, {"embeddings": [HEAD, WTE]})  # the root is the head's name
        model.save_pretrained(tmp_path)
        base = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(base.wte.weight, model.transformer.wte.weight)

    def test_one_differing_element_is_a_conflict(self, model, tmp_path):
        model.save_pretrained(tmp_path)

        def nudge(tensors):
            tensors[HEAD] = tensors[WTE].clone()
            tensors[HEAD][3, 5] += 1e-3

        rewrite(tmp_path, nudge)
        with pytest.raises(TyingError, match=r"at \[3, 5\], 1 of 1024 elements"):
            reload(model, tmp_path)

    def test_rounding_to_bfloat16_on_one_side_is_a_conflict(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        rewrite(tmp_path, lambda tensors: tensors.update({HEAD: tensors[WTE].bfloat16().float()}))
        with pytest.raises(TyingError, match="different values"):
            reload(model, tmp_path)

    def test_the_same_nan_in_both_is_no_conflict(self, model, tmp_path):
        model.save_pretrained(tmp_path)

        def spoil(tensors):
            tensors[WTE][0, 0] = float("nan")
            tensors[HEAD] = tensors[WTE].clone()

        rewrite(tmp_path, spoil)
        assert_tied(reload(model, tmp_path))

    def test_a_file_without_any_name_of_the_group_reports_it_missing(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        rewrite(tmp_path, lambda tensors: tensors.pop(WTE))
        loaded, info = reload(model, tmp_path, output_loading_info=True)
        assert_tied(loaded)
        assert WTE in info["missing_keys"]
        assert 0.005 < loaded.transformer.wte.weight.std() < 0.05  # GPT-2's initialisation, not uninitialised memory


def test_a_plain_bin_checkpoint_with_aliases_loads_tied(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(dict(model.state_dict(keep_vars=True)), tmp_path / "pytorch_model.bin")
    loaded = reload(model, tmp_path)
    assert_tied(loaded)
    assert torch.equal(logits(loaded), logits(model))


def test_a_model_untied_by_hand_is_not_saved_as_tied(model, tmp_path):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(TyingError, match="expected 'lm_head.weight' and 'transformer.wte.weight' to be one parameter"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("save_format, names", [("dedup", {WTE}), ("portable", {WTE, HEAD})])
def test_the_save_format_decides_which_names_lie_in_the_file(form, tmp_path, save_format, names):
    model = tied_model(form, spec=TyingConfig(scheme="two_way", save_format=save_format))
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() & {WTE, HEAD} == names
    assert_tied(reload(model, tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["tying"]["save_format"] == save_format


def test_after_untie_the_file_and_every_later_load_stay_untied(model, tmp_path):
    untie(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path) if picklable(model) else reload(model, tmp_path)
    loaded.tie_weights()
    loaded.resize_token_embeddings(70)
    assert loaded.lm_head.weight is not loaded.transformer.wte.weight
    assert loaded.config.tie_word_embeddings is False
    assert stock_class(loaded) is GPT2LMHeadModel
