"""A model not whole yet, inside another, or in wrappers: a tie is resolved late, moves up, and is seen through."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, RTDetrV2Config
from transformers import RTDetrV2ForObjectDetection as RTDetr

from hf_tying import TyingError, assert_tied, tie, untie
from hf_tying.ties.slots import names_of

from ..tiny import logits, shared_names, tiny_config, tiny_inputs, tiny_model, untied_model

UP = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]

# --- a subclass that adds modules ------------------------------------------------------------------------------------


class AddsAndPostInits(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.mtp_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class AddsAlone(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.mtp_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class AddsInTwoSteps(AddsAndPostInits):
    def __init__(self, config):
        super().__init__(config)
        self.value = nn.Linear(config.hidden_size, 1)
        self.post_init()


@pytest.mark.parametrize("cls", [AddsAndPostInits, AddsAlone, AddsInTwoSteps])
def test_a_tie_of_modules_that_a_subclass_adds_is_loaded_again(cls, tmp_path):
    model = tie(cls(tiny_config("llama")), ["mtp_head.weight", "lm_head.weight"], init_from="output")
    model.save_pretrained(tmp_path)
    again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert_tied(again)
    assert again.mtp_head.weight is again.lm_head.weight and not info["missing_keys"]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("cls", [LlamaForCausalLM, AddsAndPostInits])
def test_a_name_that_the_whole_model_does_not_have_is_refused_when_it_is_made(cls):
    entry = {"version": 1, "groups": {"heads": ["lm_head.weight", "mtp_haed.weight"]}}
    with pytest.raises(TyingError, match="mtp_haed"):
        cls(tiny_config("llama", tying=entry))


def test_and_of_a_subclass_that_does_not_say_when_it_is_whole_at_the_load(tmp_path):
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    entry = {"version": 1, "groups": {"heads": ["lm_head.weight", "mtp_haed.weight"]}}
    with pytest.raises(TyingError, match="mtp_haed"):
        AddsAlone.from_pretrained(tmp_path, tying=entry)


# --- a model inside a model ------------------------------------------------------------------------------------------


class WrapperConfig(PreTrainedConfig):
    model_type = "wrapper_of_a_llama"
    llama: dict | None = None


class Wrapper(PreTrainedModel):
    config_class = WrapperConfig

    def __init__(self, config):
        super().__init__(config)
        self.lm = LlamaForCausalLM(LlamaConfig(**config.llama))
        self.value = nn.Linear(16, 1)
        self.post_init()


def wrapper(**changes) -> Wrapper:
    fields = {k: v for k, v in tiny_config("llama", **changes).to_diff_dict().items() if k != "model_type"}
    return Wrapper(WrapperConfig(llama=fields)).eval()


@pytest.mark.parametrize("ties", ["layers", "two_way"])
def test_a_tie_made_on_a_model_inside_is_in_the_file_of_the_outer_one(ties, tmp_path):
    outer = wrapper(tie_word_embeddings=False)
    tie(outer.lm, UP if ties == "layers" else ties, init_from="mean" if ties == "layers" else "output")
    expected = logits(outer.lm)
    outer.save_pretrained(tmp_path)
    assert_tied(outer)
    again, info = Wrapper.from_pretrained(tmp_path, output_loading_info=True)
    assert_tied(again)
    assert not info["missing_keys"] and torch.equal(logits(again.eval().lm), expected)
    assert shared_names(again) == shared_names(outer) != []


def test_an_outer_model_without_ties_inside_is_saved_as_ever(tmp_path):
    outer = wrapper()
    cls = type(outer)
    outer.save_pretrained(tmp_path)
    assert type(outer) is cls and not hasattr(outer.config, "tying")


def test_a_broken_tie_inside_stops_the_outer_save_before_a_file_is_written(tmp_path):
    outer = wrapper(tie_word_embeddings=False)
    tie(outer.lm, UP, init_from="mean")
    outer.lm.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(32, 16))
    with pytest.raises(TyingError):
        outer.save_pretrained(tmp_path / "out")
    assert type(outer) is Wrapper and not list(tmp_path.glob("out/*.safetensors"))


# --- wrappers --------------------------------------------------------------------------------------------------------

WRAPPED = {
    "activation checkpointing": checkpoint_wrapper,
    "torch.compile": lambda module: torch.compile(module, backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("place", ["layer", "embedding", "whole"])
def test_a_tie_is_seen_through_a_wrapper(wrap, place):
    model = tie(untied_model("llama"), "two_way", init_from="output")
    tie(model, UP, init_from="mean")
    expected, inputs = logits(model), tiny_inputs(model)
    outer = model
    if place == "layer":
        model.model.layers[1] = wrap(model.model.layers[1])
    elif place == "embedding":
        model.model.embed_tokens = wrap(model.model.embed_tokens)
    else:
        outer = wrap(model)
    assert_tied(outer)
    outer.train()(**inputs).loss.backward()
    assert torch.equal(logits(model), expected)
    assert names_of(model, model.lm_head.weight) == ["model.embed_tokens.weight", "lm_head.weight"]
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert_tied(outer)


# --- names, as a user gives them -------------------------------------------------------------------------------------


def test_what_lies_below_a_module_is_untied_by_its_name():
    model = tie(untied_model("llama"), ["model.layers.0", "model.layers.1"], init_from="model.layers.0")
    assert len(shared_names(model)) == 9
    values = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    untie(model, "model.layers.1.mlp")
    assert len(shared_names(model)) == 6
    untie(model, ["model.layers.1"])
    assert shared_names(model) == [] and all(torch.equal(model.get_parameter(n), v) for n, v in values.items())


def test_a_group_is_untied_by_its_name():
    model = tie(untied_model("llama"), {"up": UP}, init_from="mean")
    tie(model, "two_way", init_from="output")
    untie(model, "up")
    assert [group.name for group in model.tie_groups] == ["embeddings"]


@pytest.mark.parametrize("name, message", [
    ("model.norm", "holds nothing that is tied"), ("model.norm.weight", "is not tied"),
    ("model.nrm", "does not exist"),
])  # fmt: skip
def test_a_name_under_which_nothing_is_tied_is_refused_for_what_it_is(name, message):
    with pytest.raises(TyingError, match=f"Cannot untie '{name}': it {message}"):
        untie(tie(untied_model("llama"), UP, init_from="mean"), name)


def test_values_are_those_of_a_module():
    model = untied_model("llama")
    values = {n: p.detach().clone() for n, p in model.model.layers[1].named_parameters()}
    tie(model, ["model.layers.0", "model.layers.1"], init_from="model.layers.1")
    assert all(torch.equal(p, values[n]) for n, p in model.model.layers[0].named_parameters())


def test_pairs_are_taken_as_transformers_writes_them():
    model = tie(untied_model("llama"), {"lm_head.weight": "model.embed_tokens.weight", UP[1]: UP[0]}, init_from="mean")
    assert shared_names(model) == [["model.embed_tokens.weight", "lm_head.weight"], UP]


def test_pairs_that_meet_are_one_group_with_the_last_source_as_its_root():
    model = untied_model("llama")
    a, b, c = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qko")
    tie(model, {b: a, c: b}, init_from=a)
    assert model.tie_groups[0].names == (a, b, c)


def test_the_name_that_a_user_gave_to_a_group_survives_a_later_scheme():
    model = tie(untied_model("llama"), {"up": UP}, init_from="mean")
    tie(model, {"words": ["lm_head.weight", "model.embed_tokens.weight"]}, init_from="output")
    tie(model, "two_way")
    assert {group.name: group.root for group in model.tie_groups} == {"up": UP[0], "words": "lm_head.weight"}


# --- declarations, as transformers reads them ------------------------------------------------------------------------


def rt_detr_config(**changes):
    return RTDetrV2Config(**dict(
        d_model=16, encoder_hidden_dim=16, encoder_in_channels=[16, 16, 16], encoder_ffn_dim=32, encoder_layers=1,
        encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=32, decoder_attention_heads=2, num_queries=5,
        decoder_in_channels=[16, 16, 16], num_denoising=0, decoder_n_levels=3,
    ) | changes)  # fmt: skip


def test_a_later_pattern_of_a_declaration_overrides_an_earlier_one(tmp_path):
    torch.manual_seed(0)
    model = RTDetr(rt_detr_config())
    heads = [head.weight for head in model.class_embed]
    stock = {frozenset(names) for names in shared_names(model)}
    assert heads[0] is not heads[1]
    assert_tied(model)  # as its class ties it
    held = RTDetr(rt_detr_config(tying={"version": 1}))
    assert {frozenset(names) for names in shared_names(held)} == stock
    with torch.no_grad():
        heads[0].add_(1)
    model.save_pretrained(tmp_path)
    again = RTDetr.from_pretrained(tmp_path, tying={"version": 1})
    assert_tied(again)
    assert all(torch.equal(a, b.weight) for a, b in zip(heads, again.class_embed, strict=True))
