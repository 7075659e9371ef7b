"""Whatever takes the state dict of an untouched tied model takes that of a held one, with the same result.

Each test runs once on a stock model, the control, and once on a held one.
"""

import copy
import tempfile

import pytest
import torch
from accelerate import Accelerator, load_checkpoint_in_model
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import LlamaForCausalLM

from hf_tying import TyingError, assert_tied, tie

from ..tiny import logits, tiny_config, tiny_model

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(params=["stock", "held"])
def make(request):
    """Makes a tied model: one that the package has never touched, or one that it holds."""

    def made(seed: int = 0):
        model = tiny_model("llama", seed, tie_word_embeddings=True)
        return tie(model, "two_way") if request.param == "held" else model

    return made


def untied() -> LlamaForCausalLM:
    return LlamaForCausalLM(tiny_config("llama", tie_word_embeddings=False))


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_entries_and_names_are_torchs_own(make):
    model = make()
    assert {type(value) for value in model.state_dict().values()} == {torch.Tensor}
    assert {type(name) for name, _ in model.named_parameters()} == {str}
    assert HEAD not in dict(model.named_parameters()) and HEAD in model.state_dict()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_plain_model_takes_it(make, device, assign):
    if device == "meta" and not assign:
        return  # nothing can be copied to a tensor without memory
    model = make()
    with torch.device(device):
        twin = untied()
    assert str(twin.load_state_dict(model.state_dict(), assign=assign)) == "<All keys matched successfully>"
    assert type(twin.lm_head.weight) is nn.Parameter and same(twin, model)


def test_an_entry_becomes_a_parameter(make):
    entry = make().state_dict()[HEAD]
    for parameter in (nn.Parameter(entry), nn.Parameter(entry, requires_grad=False)):
        assert type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor


def test_accelerate_puts_entries_into_a_module(make):
    with torch.device("meta"):
        twin = untied()
    model = make()
    for name, value in model.state_dict().items():
        set_module_tensor_to_device(twin, name, "cpu", value=value)
    assert type(twin.lm_head.weight) is nn.Parameter and same(twin, model)


def test_from_pretrained_takes_it(make):
    model = make()
    loaded = LlamaForCausalLM.from_pretrained(
        None, config=tiny_config("llama", tie_word_embeddings=False), state_dict=model.state_dict()
    )
    assert same(loaded, model)


@pytest.mark.parametrize("order", [list, sorted, lambda state: sorted(state, reverse=True)])
def test_a_live_state_dict_is_filled_in_any_order(make, order):
    model, values = make(1), {key: value.clone() for key, value in make(0).state_dict().items()}
    state = model.state_dict()
    with torch.no_grad():
        for key in order(state):
            state[key].copy_(values[key])
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_safetensors_saves_and_loads_a_model(make, tmp_path):
    model, other = make(0), make(1)
    save_model(model, str(tmp_path / "model.safetensors"))
    assert load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert same(other, model) and other.lm_head.weight is other.model.embed_tokens.weight


def test_accelerator_resumes_from_its_own_state(make, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(make(0))
    accelerator.save_state(str(tmp_path))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("written", ["safetensors", "save_pretrained"])
def test_accelerate_loads_a_folder_into_a_model(make, written, tmp_path):
    model, other = make(0), make(1)
    if written == "safetensors":
        save_model(model, str(tmp_path / "model.safetensors"), {"format": "pt"})
    else:
        model.save_pretrained(tmp_path)
    load_checkpoint_in_model(other, str(tmp_path))
    assert same(other, model)


@pytest.mark.parametrize("strict", [False, True])
def test_the_hub_mixin_loads_a_wrapper_around_it(make, strict, tmp_path):
    class Wrapper(nn.Module, PyTorchModelHubMixin):
        def __init__(self):
            super().__init__()
            self.inner = make(1)

    wrapper = Wrapper()
    wrapper.inner.load_state_dict(make(0).state_dict())
    wrapper.save_pretrained(tmp_path)
    assert same(Wrapper.from_pretrained(tmp_path, strict=strict).inner, make(0))


def test_torch_spreads_a_file_with_one_name_over_a_model(make, tmp_path):
    model, other = make(0), make(1)
    save_model(model, str(tmp_path / "model.safetensors"))
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(other, load_file(tmp_path / "model.safetensors"), options=options)
    assert same(other, model)


@pytest.mark.parametrize("kept", [EMBED, HEAD])
@pytest.mark.parametrize("assign", [False, True])
def test_a_load_that_is_not_strict_tells_which_name_was_not_there(make, kept, assign):
    model, other = make(0), make(1)
    state = {key: value for key, value in model.state_dict().items() if key == kept or key not in (EMBED, HEAD)}
    result = other.load_state_dict(state, strict=False, assign=assign)
    assert result.unexpected_keys == [] and result.missing_keys == [{EMBED: HEAD, HEAD: EMBED}[kept]]
    held = hasattr(other, "tie_groups")
    assert other.lm_head.weight is other.model.embed_tokens.weight or (assign and not held)
    if held or not assign:
        assert same(other, model)


def test_a_held_model_stays_tied_when_it_is_assigned_inside_another_module():
    outer = nn.ModuleDict({"model": tie(tiny_model("llama", 1, tie_word_embeddings=True), "two_way")})
    source = nn.ModuleDict({"model": tiny_model("llama", 0, tie_word_embeddings=True)})
    outer.load_state_dict(source.state_dict(), assign=True)
    assert_tied(outer["model"])
    assert torch.equal(logits(outer["model"]), logits(source["model"]))


def test_a_held_model_refuses_two_values_for_one_matrix_and_loads_nothing():
    model = tie(tiny_model("llama", tie_word_embeddings=True), "two_way")
    before = copy.deepcopy(model.state_dict())
    state = {key: value + 1 for key, value in model.state_dict().items()} | {HEAD: before[HEAD] + 2}
    with pytest.raises(TyingError, match="different values for them"):
        model.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_entry_that_is_the_live_matrix_brings_no_value():
    """Loaders put the live state dict below what they have read."""
    model, values = (
        tie(tiny_model("llama", 1, tie_word_embeddings=True), "two_way"),
        tiny_model("llama", 0).state_dict(),
    )
    for read in (EMBED, HEAD):
        other = copy.deepcopy(model)
        other.load_state_dict({**other.state_dict(), read: values[EMBED]})
        assert torch.equal(other.lm_head.weight, values[EMBED])


def test_the_written_file_is_the_stock_one(make):
    folder = tempfile.mkdtemp()
    make().save_pretrained(folder)
    stock = tempfile.mkdtemp()
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(stock)
    ours, theirs = (load_file(f"{place}/model.safetensors") for place in (folder, stock))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
