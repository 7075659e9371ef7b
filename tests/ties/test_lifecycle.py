"""A tied model of every architecture trains as one parameter, and stays tied through files, untie, tie and copies."""

import copy
import pickle

import pytest
import torch

from hf_tying import TyingError, assert_tied, tie, untie

from ..tiny import FULL_SCHEME, logits, shared_names, tiny_inputs, untied_model, untied_twin
from .helpers import DTYPES, FORMATS, every_architecture, every_dtype, keys_in, load, on_disk, step, the_group, tied

# --- training --------------------------------------------------------------------------------------------------------


@every_dtype
@every_architecture
def test_the_gradient_of_a_tied_matrix_is_the_sum_of_an_untied_twins_gradients(arch, dtype):
    untied = untied_model(arch, dtype=DTYPES[dtype])
    model = tied(arch, dtype)
    names = the_group(model)
    assert shared_names(untied) == [] and shared_names(model) == [sorted(names, key=list(untied.state_dict()).index)]
    twin = untied_twin(model, untied)
    for each in (model, twin):
        each(**tiny_inputs(each)).loss.backward()
    theirs = dict(twin.named_parameters())
    parts = [p.grad.float() for name in names if (p := theirs[name]).grad is not None]
    assert len(parts) >= 2 and all(part.abs().max() > 0 for part in parts)
    expected = sum(parts)
    # In bfloat16 (8 bits) the tied gradient is rounded once more for each use that is added to it.
    tolerance = 1e-6 if dtype == "float32" else len(names) * 2**-8
    gap = (model.get_parameter(names[0]).grad.float() - expected).abs().max()
    assert gap <= tolerance * expected.abs().max()


@every_dtype
@every_architecture
def test_an_optimizer_step_moves_one_parameter_and_leaves_it_one(arch, dtype):
    model = tied(arch, dtype)
    names = the_group(model)
    before = model.get_parameter(names[0])
    values = before.detach().clone()
    assert sum(p is before for p in model.parameters()) == 1
    step(model)
    assert all(model.get_parameter(name) is before for name in names)
    assert not torch.equal(before, values)
    assert_tied(model)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_format", FORMATS)
@every_dtype
@every_architecture
def test_a_tied_model_lives_through_files_and_untie_and_tie_again(arch, dtype, save_format, tmp_path):
    model = tied(arch, dtype, save_format)
    step(model)
    expected, names, everything = logits(model), the_group(model), set(model.state_dict())
    model.save_pretrained(tmp_path / "tied")
    dropped = set(names[1:]) if save_format == "dedup" else set()
    assert keys_in(tmp_path / "tied") == on_disk(model, everything - dropped)

    loaded = load(arch, tmp_path / "tied")
    assert_tied(loaded)
    assert the_group(loaded) == names and len({id(loaded.get_parameter(name)) for name in names}) == 1
    assert loaded.config.tying == model.config.tying and loaded.dtype == DTYPES[dtype]
    assert torch.equal(logits(loaded), expected)

    untie(loaded, list(names))
    assert len({id(loaded.get_parameter(name)) for name in names}) == len(names)
    assert torch.equal(logits(loaded), expected)
    step(loaded)  # the matrices go their own ways
    apart = logits(loaded)
    loaded.save_pretrained(tmp_path / "untied")
    assert keys_in(tmp_path / "untied") == on_disk(loaded, everything)
    again = load(arch, tmp_path / "untied")
    assert shared_names(again) == [] and again.config.tying["groups"] == {} and again.config.tying["scheme"] == "none"
    assert torch.equal(logits(again), apart)
    with pytest.raises(TyingError, match="init_from"):
        tie(again, FULL_SCHEME[arch])
    assert torch.equal(logits(again), apart)

    tie(again, FULL_SCHEME[arch], init_from="target")
    again.save_pretrained(tmp_path / "again")
    final = load(arch, tmp_path / "again")
    assert_tied(final)
    assert set(the_group(final)) == set(names) and torch.equal(logits(final), logits(again))


@every_architecture
def test_shards_hold_what_one_file_holds(arch, tmp_path):
    for save_format in FORMATS:
        model = tied(arch, save_format=save_format)
        model.save_pretrained(tmp_path / save_format, max_shard_size="3KB")
        assert len(list((tmp_path / save_format).glob("*.safetensors"))) > 2
        dropped = set(the_group(model)[1:]) if save_format == "dedup" else set()
        assert keys_in(tmp_path / save_format) == on_disk(model, set(model.state_dict()) - dropped)
        loaded = load(arch, tmp_path / save_format)
        assert_tied(loaded)
        assert the_group(loaded) == the_group(model) and torch.equal(logits(loaded), logits(model))


# --- copies ----------------------------------------------------------------------------------------------------------


@every_architecture
def test_copies_of_a_model_are_tied_in_themselves_and_to_nothing_else(arch, tmp_path):
    model = tied(arch)
    torch.save(model, tmp_path / "whole.pt")
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(tmp_path / "whole.pt", weights_only=False),
    }
    for other in copies.values():
        assert_tied(other)
        assert type(other) is type(model) and other.tie_groups == model.tie_groups
        assert shared_names(other) == shared_names(model)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        assert torch.equal(logits(other), logits(model))
        step(other)
        assert_tied(other)
        other.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(load(arch, tmp_path / "saved")), logits(other))
