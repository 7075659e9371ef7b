"""f01 to f05, f11: a file that transformers would load or save untied, without a word, stays tied or is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel

from hf_tying import TyingConfig, TyingError, assert_tied, tie, untie

from ..forms import matrix, picklable, reload, stock_class, tied_model
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

    def test_loading_conflicting_values_names_the_difference_and_the_ways_out(self, model, conflicting):
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

    def test_on_conflict_can_be_chosen_in_the_call(self, model, conflicting):
        entry = {**model.config.tying, "on_conflict": f"use:{HEAD}"}
        loaded = reload(model, conflicting, tying=entry)
        assert torch.equal(matrix(loaded, "target"), matrix(model, "target") + 1.0)

    def test_use_of_a_name_outside_the_conflict_is_refused(self, model, conflicting):
        set_entry(conflicting, on_conflict="use:transformer.wpe.weight")
        with pytest.raises(TyingError, match="the conflict is between"):
            reload(model, conflicting)


class TestOpenedUntied:
    """f02: a checkpoint written tied, opened with tie_word_embeddings=False."""

    def test_a_tied_file_opened_with_the_flag_off_is_refused_with_the_way_out(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        with pytest.raises(TyingError, match="tie_word_embeddings=True.*untie"):
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

    def test_tie_takes_over_a_tie_made_by_hand_and_the_file_holds_it(self, tmp_path):
        model = tiny_model("gpt2", tie_word_embeddings=False)
        model.lm_head.weight = model.transformer.wte.weight
        tie(model, "two_way").save_pretrained(tmp_path)
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
        assert_tied(loaded)
        assert torch.equal(logits(loaded), logits(model))

    def test_a_tie_made_by_hand_on_an_untied_model_is_refused_at_the_save(self, model, tmp_path):
        untie(model)
        model.lm_head.weight = model.transformer.wte.weight
        with pytest.raises(TyingError, match="are one parameter, but no group declares it"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestTiedLayers:
    """f05: two MLP layers as one."""

    NAMES = ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.weight"]

    @pytest.mark.parametrize("flag", [True, False])
    def test_tied_layers_save_and_reload_tied_whatever_the_embeddings_do(self, form, flag, tmp_path):
        model = tied_model(form, spec="two_way" if flag else "none")
        tie(model, self.NAMES, init_from=self.NAMES[0])
        assert model.config.tie_word_embeddings is flag
        model.save_pretrained(tmp_path)
        loaded = reload(model, tmp_path)
        assert_tied(loaded)
        assert loaded.get_parameter(self.NAMES[0]) is loaded.get_parameter(self.NAMES[1])
        assert torch.equal(logits(loaded), logits(model))

    def test_a_file_of_tied_layers_holds_every_name(self, model, tmp_path):
        tie(model, self.NAMES, init_from=self.NAMES[0])
        model.save_pretrained(tmp_path)
        assert set(self.NAMES) <= load_file(tmp_path / "model.safetensors").keys()


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
