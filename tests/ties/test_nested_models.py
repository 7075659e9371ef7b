"""Ties hold where a model lies in another one: a base model in a head model, models in a `ModuleList`."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

from hf_tying import TiedModelMixin, TyingConfig, TyingError, assert_tied, tie, untie

from ..tiny import AUTO, FULL_SCHEME, layer_pair, shared_names, split, tiny_config, untied_model
from .helpers import FORMATS, every_architecture

# --- base model and head model over one file -------------------------------------------------------------------------


@pytest.mark.parametrize("save_format", FORMATS)
@every_architecture
def test_the_base_model_reads_the_head_models_file_and_keeps_the_ties_inside_it(arch, save_format, tmp_path):
    model = untied_model(arch)
    pair = layer_pair(model)
    config = TyingConfig(scheme=FULL_SCHEME[arch], groups={"layers": pair}, save_format=save_format)
    tie(model, config, init_from="mean")
    model.save_pretrained(tmp_path / "head")
    base, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert_tied(base)
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    below = set(base.state_dict())
    # The file of the head model never had BERT's pooler, nor what Marian computes.
    absent = {n for n in below if "pooler" in n or "embed_positions" in n}
    assert info["missing_keys"] <= absent
    inside = [[n for name in names if (n := name.removeprefix(prefix)) in below] for names in shared_names(model)]
    assert [n.removeprefix(prefix) for n in pair] in inside
    assert shared_names(base) == [names for names in inside if len(names) > 1]
    values = model.state_dict()
    outer = {name: prefix + name if prefix + name in values else name for name in below}
    assert all(torch.equal(value, values[outer[n]]) for n, value in base.state_dict().items() if n not in absent)

    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert shared_names(again) == shared_names(base)
    head, info = AUTO[arch].from_pretrained(tmp_path / "base", output_loading_info=True)
    assert sorted(pair) in [sorted(names) for names in shared_names(head)]
    assert not set(outer.values()) & set(info["missing_keys"])


def test_the_base_model_inside_a_head_model_can_be_saved_by_itself(tmp_path):
    model = untied_model("llama")
    pair = layer_pair(model)
    tie(model, TyingConfig(scheme="two_way", groups={"layers": pair}), init_from="mean")
    entry = copy.deepcopy(model.config.tying)
    model.base_model.save_pretrained(tmp_path)
    assert model.config.tying == entry  # they share one config, whose names are the outer model's
    assert_tied(model)
    base = LlamaModel.from_pretrained(tmp_path)
    assert shared_names(base) == [sorted(n.removeprefix("model.") for n in pair)]


# --- models in a list and beside it ----------------------------------------------------------------------------------


class Panel(PreTrainedModel):
    """Two language models in a `ModuleList` and one beside it: what ensembles and distillation set-ups look like."""

    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.members = nn.ModuleList([LlamaForCausalLM(copy.deepcopy(config)) for _ in range(2)])
        self.judge = LlamaForCausalLM(copy.deepcopy(config))
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return sum(model(input_ids=input_ids).logits for model in (*self.members, self.judge))


HEADS = [f"{path}.lm_head.weight" for path in ("members.0", "members.1", "judge")]
EMBEDDINGS = [f"{path}.model.embed_tokens.weight" for path in ("members.0", "members.1", "judge")]


def panel(**changes) -> Panel:
    torch.manual_seed(0)
    return Panel(tiny_config("llama", **changes)).eval()


def panel_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None])


@pytest.mark.parametrize("save_format", FORMATS)
@pytest.mark.parametrize(
    "groups",
    [
        {"each": [HEADS[0], EMBEDDINGS[0]], "other": [EMBEDDINGS[1], HEADS[1]]},
        {"across": EMBEDDINGS},
        {"all": [*HEADS, *EMBEDDINGS]},
        {"judge": ["judge.model.layers.0.mlp.up_proj.weight", "members.1.model.layers.1.mlp.up_proj.weight"]},
        {"modules": ["members.0.model", "members.1.model"]},
    ],
    ids=["inside each", "across models", "everything", "layers of two models", "whole models"],
)
def test_ties_hold_inside_and_across_models_in_a_module_list(groups, save_format, tmp_path):
    model = panel(tie_word_embeddings=False)
    assert shared_names(model) == []
    tie(model, TyingConfig(groups=groups, save_format=save_format), init_from="mean")
    assert_tied(model)
    assert sorted(map(sorted, shared_names(model))) == sorted(sorted(group.names) for group in model.tie_groups)
    model.save_pretrained(tmp_path)
    loaded, info = Panel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_tied(loaded)
    assert shared_names(loaded) == shared_names(model)
    assert torch.equal(panel_logits(loaded), panel_logits(model))


@pytest.mark.parametrize("save_format", FORMATS)
def test_what_the_classes_inside_declare_is_kept_in_a_file_too(save_format, tmp_path):
    model = panel(tie_word_embeddings=True)
    pairs = [list(pair) for pair in zip(EMBEDDINGS, HEADS, strict=True)]
    assert shared_names(model) == pairs
    tie(model, TyingConfig(groups={"first": pairs[0]}, save_format=save_format))
    model.save_pretrained(tmp_path)
    loaded = Panel.from_pretrained(tmp_path)
    assert_tied(loaded)
    assert shared_names(loaded) == pairs
    assert torch.equal(panel_logits(loaded), panel_logits(model))


def test_a_class_over_the_mixin_holds_what_the_models_in_its_list_declare(tmp_path):
    class TiedPanel(TiedModelMixin, Panel):
        pass

    model = TiedPanel(tiny_config("llama", tie_word_embeddings=True)).eval()
    assert sorted(group.names for group in model.tie_groups) == sorted(zip(EMBEDDINGS, HEADS, strict=True))
    model.save_pretrained(tmp_path)
    loaded, info = TiedPanel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert_tied(loaded)
    assert shared_names(loaded) == shared_names(model)
    assert torch.equal(panel_logits(loaded), panel_logits(model))


def test_a_broken_tie_of_a_model_in_a_list_is_found():
    model = panel(tie_word_embeddings=True)
    assert_tied(model)
    split(model, [HEADS[1]])
    with pytest.raises(TyingError, match=HEADS[1]):
        assert_tied(model)


def test_one_model_inside_is_untied_and_the_others_stay_tied(tmp_path):
    model = panel(tie_word_embeddings=True)
    untie(model, [HEADS[1]])
    assert shared_names(model) == [[EMBEDDINGS[0], HEADS[0]], [EMBEDDINGS[2], HEADS[2]]]
    with torch.no_grad():
        model.get_parameter(HEADS[1]).add_(1.0)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded = Panel.from_pretrained(tmp_path)
    assert shared_names(loaded) == shared_names(model)
    assert torch.equal(panel_logits(loaded), panel_logits(model))


def test_a_tied_part_of_a_model_can_be_saved_and_loaded_by_itself(tmp_path):
    model = panel(tie_word_embeddings=False)
    tie(model, {"first": [EMBEDDINGS[0], HEADS[0]]}, init_from=EMBEDDINGS[0])
    model.members[0].save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert_tied(loaded)
    assert shared_names(loaded) == [["model.embed_tokens.weight", "lm_head.weight"]]
    with torch.no_grad():
        ids = torch.arange(8)[None]
        # Not the same kernel: the outer class has its attention written out.
        torch.testing.assert_close(loaded(ids).logits, model.members[0].eval()(ids).logits)
