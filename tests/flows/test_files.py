"""f01 to f05, f11: what is in a file of shared layers and relaxed ties is read, filled in, or refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_tying import TyingError, assert_tied, gap, share_layers, tie, unroll, untie
from hf_tying.ties.relaxation import value_at

from ..tiny import logits
from .kinds import LOW_RANK, RELAXED, made, names_in, plain

load = AutoModelForCausalLM.from_pretrained


def rewrite(folder, change):
    """Change the tensors of a saved model by `change(tensors)`."""
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, file, {"format": "pt"})


def entry(folder, **changes):
    """The `tying` entry of config.json, with changes; `tying=None` takes it out."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    held = config.pop("tying", None)
    if changes != {"tying": None}:
        config["tying"] = (held or {}) | changes
    path.write_text(json.dumps(config))
    return held


def parameters(model):
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


class TestConflictingValues:
    """f01: a member of a group has another value in the file than its root, or than its root and difference make."""

    @pytest.fixture
    def conflicting(self, model, kind, tmp_path):
        model.save_pretrained(tmp_path)
        root, member = names_in(kind)
        rewrite(tmp_path, lambda tensors: tensors.update({member: tensors[root] + 1}))
        return tmp_path

    def test_is_refused_with_the_ways_out(self, kind, conflicting):
        root, member = names_in(kind)
        with pytest.raises(TyingError) as error:
            load(conflicting)
        for word in (root, member, "No weights are dropped unasked", f"use:{root}", "keep_untied"):
            assert word in str(error.value)

    def test_keep_untied_keeps_both_whatever_is_called_later_and_saved(self, model, kind, conflicting, tmp_path):
        entry(conflicting, on_conflict="keep_untied")
        loaded = load(conflicting)
        root, member = names_in(kind)
        loaded.tie_weights()
        loaded.resize_token_embeddings(70)
        assert_tied(loaded)
        apart = loaded.get_parameter(member)[:16] - loaded.get_parameter(root)[:16]
        torch.testing.assert_close(apart, torch.ones_like(apart))
        assert member not in str(loaded.config.tying)
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(load(tmp_path / "again")), logits(loaded))

    def test_use_takes_the_root_with_the_differences_of_the_file(self, model, kind, conflicting):
        entry(conflicting, on_conflict=f"use:{names_in(kind)[0]}")
        loaded = load(conflicting)
        assert_tied(loaded)
        assert torch.equal(logits(loaded), logits(model)) and gap(loaded) == gap(model)

    def test_use_of_a_member_takes_its_value_for_all_and_is_refused_where_it_is_relaxed(self, kind, conflicting):
        root, member = names_in(kind)
        entry(conflicting, on_conflict=f"use:{member}")
        if kind in RELAXED:
            with pytest.raises(TyingError, match=f"use:{root}"):
                load(conflicting)
            return
        loaded, before = load(conflicting), made(kind)
        torch.testing.assert_close(loaded.get_parameter(root), before.get_parameter(root) + 1)

    def test_a_file_that_stock_has_trained_since_is_refused(self, kind, tmp_path):
        """Stock keeps the entry of the config, and drops the numbers of the differences."""
        made(kind).save_pretrained(tmp_path)
        held = entry(tmp_path, tying=None)
        if kind == "shared layers, with factors":
            with pytest.raises(OSError, match="no file named"):  # no name of a file that stock looks for
                load(tmp_path)
            return
        stock = load(tmp_path)
        assert not hasattr(stock, "tie_groups")
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
        stock.save_pretrained(tmp_path)
        entry(tmp_path, **held)
        with pytest.raises(TyingError, match="keep_untied"):
            load(tmp_path)
        entry(tmp_path, on_conflict="keep_untied")
        assert torch.equal(logits(load(tmp_path)), logits(stock))


@pytest.mark.parametrize("flag", [True, False])
def test_the_flag_of_the_embeddings_neither_opens_nor_closes_the_tie(kind, model, flag, tmp_path):
    """f02."""
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, tie_word_embeddings=flag)
    assert_tied(loaded)
    assert torch.equal(logits(loaded), logits(model)) and loaded.config.tie_word_embeddings is False


@pytest.mark.parametrize("save_format", ["portable", "dedup"])
def test_shards_are_read_as_one_file(kind, save_format, tmp_path):
    """f03."""
    model = made(kind, save_format=save_format)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load(tmp_path)
    assert_tied(loaded)
    assert torch.equal(logits(loaded), logits(model)) and parameters(loaded) == parameters(model)


def test_a_tie_made_by_hand_is_refused_at_the_save_and_taken_over(kind, tmp_path):
    """f04: layers, or embeddings, that are one by `module.weight = other.weight`."""
    root, member = names_in(kind)

    def by_hand(model):
        model.get_submodule(member.removesuffix(".weight")).weight = model.get_parameter(root)
        return model

    model = by_hand(untie(made(kind)))
    with pytest.raises(TyingError, match="are one parameter, but no group declares it"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = by_hand(plain())
    if kind == "relaxed pair":
        tie(model, {"pair": {"names": [root, member], "relax": LOW_RANK}})
    else:
        share_layers(model, "cycle", 2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_a_further_tie_of_two_layers_joins_what_is_there(kind, model, tmp_path):
    """f05: and what was exact, relaxed or had a factor is so after the file."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    tie(model, names, init_from=names[0])
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_tied(loaded)
    assert loaded.get_parameter(names[0]) is loaded.get_parameter(names[1])
    assert torch.equal(logits(loaded), logits(model)) and parameters(loaded) == parameters(model)
    assert gap(loaded) == gap(model) and loaded.config.tying == model.config.tying


class TestPartsOfAFile:
    """f11: names that a file lacks, and values that almost agree."""

    def saved(self, kind, folder, change):
        model = made(kind)
        model.save_pretrained(folder)
        rewrite(folder, lambda tensors: change(tensors, *names_in(kind)))
        return model

    def test_a_missing_member_is_filled_from_the_root(self, kind, tmp_path):
        model = self.saved(kind, tmp_path, lambda tensors, root, member: tensors.pop(member))
        loaded, info = load(tmp_path, output_loading_info=True)
        assert_tied(loaded)
        assert torch.equal(logits(loaded), logits(model)) and not info["missing_keys"]

    def test_a_missing_root_is_filled_from_a_member_that_is_exact(self, kind, tmp_path):
        model = self.saved(kind, tmp_path, lambda tensors, root, member: tensors.pop(root))
        if kind in RELAXED:
            with pytest.raises(TyingError, match=f"its root '{names_in(kind)[0]}' is not there"):
                load(tmp_path)
            return
        assert torch.equal(logits(load(tmp_path)), logits(model))

    def test_a_rounded_member_is_a_conflict_where_nothing_else_has_its_value(self, kind, tmp_path):
        def change(tensors, root, member):
            tensors[member] = tensors[member].bfloat16().float()

        model = self.saved(kind, tmp_path, change)
        if kind in RELAXED:
            assert torch.equal(logits(load(tmp_path)), logits(model))
            return
        with pytest.raises(TyingError, match="keep_untied"):
            load(tmp_path)

    @pytest.mark.parametrize("whole", [False, True], ids=["no value", "a whole value"])
    def test_a_member_whose_difference_is_missing_is_its_root_or_a_conflict(self, kind, whole, tmp_path):
        def change(tensors, root, member):
            for name in [name for name in tensors if "_relaxation" in name]:
                del tensors[name]
            if not whole:
                del tensors[member]

        model = self.saved(kind, tmp_path, change)
        if whole and kind in RELAXED:
            with pytest.raises(TyingError, match="is not what its difference makes"):
                load(tmp_path)
        elif kind != "shared layers, relaxed":  # the other members still have their whole values
            loaded = load(tmp_path)
            assert set(gap(loaded).get("pair", {}).values()) <= {0.0}
            assert torch.equal(logits(loaded), logits(model)) is (kind not in RELAXED)

    def test_the_same_nan_in_all_is_no_conflict(self, kind, tmp_path):
        def change(tensors, root, member):
            tensors[root][0, 0] = tensors[member][0, 0] = float("nan")

        self.saved(kind, tmp_path, change)
        assert_tied(load(tmp_path))

    def test_a_file_with_no_name_of_the_group_says_so(self, kind, tmp_path):
        self.saved(kind, tmp_path, lambda tensors, root, member: (tensors.pop(root), tensors.pop(member)))
        loaded, info = load(tmp_path, output_loading_info=True)
        assert_tied(loaded)
        assert set(names_in(kind)) <= info["missing_keys"]
        assert value_at(loaded, names_in(kind)[1]).std() < 0.5


@pytest.mark.parametrize(("dtype", "save_format"), [(torch.bfloat16, "portable"), (torch.float16, "dedup")])
def test_a_file_is_opened_in_another_dtype_and_back(kind, dtype, save_format, tmp_path):
    """f09: values that a dtype has rounded are no conflict."""
    model = made(kind, save_format=save_format)
    model.save_pretrained(tmp_path / "whole")
    half = load(tmp_path / "whole", dtype=dtype)
    assert_tied(half)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    half.save_pretrained(tmp_path / "half")
    again = load(tmp_path / "half")
    assert torch.equal(logits(again), logits(half))
    assert_tied(load(tmp_path / "half", dtype=torch.float32))


def test_untied_and_unrolled_the_file_is_that_of_a_plain_model(kind, model, tmp_path):
    """f04: and a factor, which no plain layer has, stays."""
    before = logits(model)
    model = untie(model) if "factors" in kind or kind == "relaxed pair" else unroll(model)
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_tied(loaded)
    assert torch.equal(logits(loaded), logits(model)) and len([*loaded.parameters()]) == len(parameters(loaded))
