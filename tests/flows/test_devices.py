"""f08, f15: the meta device, maps of devices and offloading. (f16: tests/parallel/test_engines.py.)"""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.hooks import remove_hook_from_submodules
from transformers import AutoConfig, AutoModelForCausalLM

from hf_tying import TyingError, assert_tied, share_layers

from ..tiny import logits
from .kinds import made, names_in, plain

load = AutoModelForCausalLM.from_pretrained
FORMS = pytest.mark.parametrize("save_format", ["portable", "dedup"])
MAP = {f"model.{part}": "cpu" for part in ("embed_tokens", "rotary_emb", "norm")} | {"lm_head": "cpu"}
MAP |= {f"model.layers.{i}": "cpu" for i in range(4)}


def place(name):
    return name.removesuffix(".mlp.up_proj.weight").removesuffix(".weight")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a kind and a form, the logits of a model and its folder, made once."""
    held = {}

    def folder(kind, save_format):
        if (kind, save_format) not in held:
            model, path = made(kind, save_format=save_format), tmp_path_factory.mktemp("model")
            model.save_pretrained(path)
            held[kind, save_format] = logits(model), path
        return held[kind, save_format]

    return folder


@FORMS
def test_a_device_map_that_splits_a_group_is_refused_with_the_way_out(kind, save_format, folders, tmp_path):
    device_map = MAP | {place(names_in(kind)[1]): "disk"}
    with pytest.raises(TyingError, match="device_map splits group .*'disk'.*same device"):
        load(folders(kind, save_format)[1], device_map=device_map, offload_folder=tmp_path)


@FORMS
def test_what_lies_on_the_disk_computes_the_same_and_is_saved_again(kind, save_format, folders, tmp_path):
    """A portable file has whole values of relaxed places, to which no difference may be added again."""
    expected, folder = folders(kind, save_format)
    together = ["model.embed_tokens", "lm_head"] if kind == "relaxed pair" else [f"model.layers.{i}" for i in range(4)]
    device_map = MAP | dict.fromkeys(together, "disk")
    loaded = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)


@FORMS
def test_an_automatic_device_map_keeps_the_group_together(kind, save_format, folders):
    expected, folder = folders(kind, save_format)
    loaded = load(folder, device_map="auto")
    assert_tied(loaded)
    assert torch.equal(logits(loaded), expected)


@FORMS
def test_a_checkpoint_is_dispatched_onto_an_empty_model(kind, save_format, folders):
    expected, folder = folders(kind, save_format)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert_tied(empty)
    assert all(parameter.is_meta for parameter in empty.parameters())
    [file] = folder.glob("*.safetensors")
    if kind == "relaxed pair" and save_format == "portable":
        # accelerate puts what it finds under the first of the tied names, a computed tensor, into the others.
        with pytest.raises(TypeError, match="cannot assign"):
            load_checkpoint_and_dispatch(empty, str(file), device_map={"": "cpu"})
        return
    loaded = load_checkpoint_and_dispatch(empty, str(file), device_map={"": "cpu"}).eval()
    assert_tied(loaded)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_says_how_to_be_saved_and_then_is(kind, model, where, tmp_path):
    expected = logits(model)
    cpu_offload(model) if where == "cpu" else disk_offload(model, tmp_path / "offload")
    assert torch.equal(logits(model), expected)
    assert_tied(model)
    with pytest.raises(TyingError, match="remove_hook_from_submodules"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    remove_hook_from_submodules(model)
    model.tie_weights()
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), expected)


def test_what_has_no_value_is_not_shared():
    """f08."""
    with pytest.raises(TyingError, match="on the meta device and has no value"):
        share_layers(plain().to("meta"), "cycle", 2)
