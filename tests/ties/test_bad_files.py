"""Broken weight files and state dicts are refused by name, and nothing is loaded or written over."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_tying import TyingError, assert_tied, tie, tying_report

from ..tiny import VOCAB, split, untied_model
from .refusals import EMBED, HEAD, UP, refused, set_entry, tied_folder

# --- weight files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 500, -1, -1000])
def test_a_truncated_file_is_named_before_any_weight_is_loaded(keep, tmp_path):
    path = tied_folder(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with refused("model.safetensors", "truncated", "save it again", folder=tmp_path):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_truncated_shard_is_named(tmp_path):
    tied_folder(tmp_path / "whole")
    LlamaForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-4])
    with refused(shard.name, "truncated", folder=tmp_path / "shards"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "shards")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: struct.pack("<Q", 2**63) + data[8:],
        lambda data: struct.pack("<Q", 2**32) + data[8:],
        lambda data: data[:8] + b"\xff" * 64 + data[72:],
        lambda data: data.replace(b'"F32"', b'"F99"', 1),
        lambda data: data.replace(b'"shape":[64,16]', b'"shape":[64,17]', 1),
        lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
        lambda data: data[:8] + b"[" * 400 + data[408:],
        lambda data: b"PK\x03\x04" + data[4:],
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        lambda data: data + b"\0" * 64,
    ],
    ids=["length 2^63", "length 2^32", "utf-8", "dtype", "shape", "offsets", "nesting", "zip", "pointer", "tail"],
)  # fmt: skip
def test_a_corrupted_file_is_named(change, tmp_path):
    path = tied_folder(tmp_path) / "model.safetensors"
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    with refused("model.safetensors", folder=tmp_path):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with refused("model.safetensors", folder=tmp_path):
        tying_report(tmp_path)


def test_a_name_of_another_shape_is_an_error_or_as_asked_left_out(tmp_path):
    path = tied_folder(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors[HEAD] = torch.zeros(VOCAB + 8, 16)
    save_file(tensors, path, {"format": "pt"})
    # The ecosystem's own: a tensor does not fit the model, named in a table on the log.
    with refused("ignore_mismatched_sizes", folder=tmp_path, by=(TyingError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert_tied(model)
    assert torch.equal(model.lm_head.weight, tensors[EMBED])


def test_a_whole_group_of_another_shape_is_new_where_asked(tmp_path):
    for save_format in ("portable", "dedup"):
        path = tied_folder(tmp_path / save_format, save_format) / "model.safetensors"
        tensors = load_file(path)
        wide = {name: torch.ones(VOCAB + 8, 16) for name in tensors if name in (EMBED, HEAD)}
        save_file(tensors | wide, path, {"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(tmp_path / save_format, ignore_mismatched_sizes=True)
        assert_tied(model)
        assert model.lm_head.weight.shape == (VOCAB, 16) and not model.lm_head.weight.is_meta
        assert model.lm_head.weight.isfinite().all() and model.lm_head.weight.std() < 1


@pytest.mark.parametrize("on_conflict", ["use:lm_head.wieght", f"use:{UP}", "use:"])
def test_a_conflict_settled_by_a_name_outside_the_group_is_an_error(on_conflict, tmp_path):
    path = tied_folder(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors[HEAD] += 1
    save_file(tensors, path, {"format": "pt"})
    entry = json.loads((tmp_path / "config.json").read_text())["tying"]
    set_entry(tmp_path, entry | {"on_conflict": on_conflict})
    with refused("on_conflict", on_conflict, EMBED, HEAD, folder=tmp_path):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --- state dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_with_two_values_for_one_parameter_changes_nothing(assign):
    model = tie(untied_model("llama"), "two_way", init_from="target")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state[HEAD] += 1
    for value in state.values():
        value += 0.5
    with refused(EMBED, HEAD, "largest difference 1 ", "untie", model=model):
        model.load_state_dict(state, assign=assign)


def test_a_broken_tie_writes_nothing_over_what_is_there(tmp_path):
    model = tie(untied_model("llama"), "two_way", init_from="target")
    model.save_pretrained(tmp_path)
    split(model, [HEAD])
    with refused(HEAD, EMBED, "found two", "untie", model=model, folder=tmp_path):
        model.save_pretrained(tmp_path)
    with refused(HEAD, "found two", model=model, folder=tmp_path):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
