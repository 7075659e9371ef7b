"""A record is this model's alone, says no more than its class can see, and is read by every class."""

import copy
import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaForCausalLM,
    LlamaModel,
)

from hf_tying import TyingConfig, TyingError, assert_tied, tie, untie

from ..tiny import logits, shared_names, tiny_config, tiny_model, untied_model

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# --- two models, one config ------------------------------------------------------------------------------------------


def saved_and_reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@pytest.mark.parametrize(
    "act, tied", [(untie, True), (lambda model: tie(model, "two_way", init_from="output"), False)]
)
def test_what_is_done_to_one_model_is_not_recorded_for_another_from_the_same_config(act, tied, tmp_path):
    config = tiny_config("llama", tie_word_embeddings=tied)
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    before = copy.deepcopy(config.to_dict())
    act(one)
    assert config.to_dict() == before and other.config is config
    assert_tied(other)
    assert (other.lm_head.weight is other.model.embed_tokens.weight) is tied
    again = saved_and_reloaded(other, tmp_path / "other")
    assert torch.equal(logits(again), logits(other)) and shared_names(again) == shared_names(other)
    assert "tying" not in json.loads((tmp_path / "other" / "config.json").read_text())
    third = LlamaForCausalLM(config)
    assert (third.lm_head.weight is third.model.embed_tokens.weight) is tied
    again = saved_and_reloaded(one, tmp_path / "one")
    assert torch.equal(logits(again), logits(one)) and shared_names(again) == shared_names(one)


def test_the_models_inside_see_the_config_that_the_outer_one_has_got():
    config = tiny_config("llama")
    one, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    untie(one)
    assert one.config is not config and one.model.config is one.config
    assert all(layer.self_attn.config is one.config for layer in one.model.layers)
    one.resize_token_embeddings(80)
    assert (one.model.config.vocab_size, other.config.vocab_size) == (80, 64)


def test_a_model_alone_with_its_config_keeps_it():
    config = tiny_config("llama")
    model = LlamaForCausalLM(config)
    assert tie(model, "two_way", init_from="output").config is config
    assert untie(model).config is config and model.model.config is config


def test_a_model_inside_keeps_the_config_that_the_outer_one_has_for_it():
    model = tiny_model("llava")
    inner = model.model.language_model
    before = inner.config
    up = [f"layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    tie(inner, up, init_from="mean")
    assert inner.config is before is model.config.text_config


def test_a_copy_of_a_model_has_a_record_of_its_own():
    model = tie(untied_model("llama"), "two_way", init_from="output")
    twin = copy.deepcopy(model)
    untie(twin)
    assert_tied(model)
    assert model.config.tying["scheme"] == "two_way" and twin.config.tying["scheme"] == "none"


# --- another class over the same file --------------------------------------------------------------------------------

CLASSES = {
    "llama": (AutoModelForCausalLM, [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModel]),
    "gpt2": (AutoModelForCausalLM, [AutoModelForSequenceClassification, AutoModel]),
    "qwen3": (AutoModelForCausalLM, [AutoModelForSequenceClassification, AutoModel]),
    "bert": (AutoModelForMaskedLM, [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModel]),
    "albert": (AutoModelForMaskedLM, [AutoModelForSequenceClassification, AutoModel]),
    "modernbert": (AutoModelForMaskedLM, [AutoModelForSequenceClassification, AutoModel]),
    "bart": (AutoModelForSeq2SeqLM, [AutoModelForSequenceClassification, AutoModel]),
    "t5": (AutoModelForSeq2SeqLM, [AutoModelForSequenceClassification, AutoModel]),
    "marian": (AutoModelForSeq2SeqLM, [AutoModel]),
}
#: As the architecture ties it by itself, untouched; and as the package holds it.
WRITTEN = ["stock", "held", "explicit group"]


def written_by(arch: str, how: str):
    model = tiny_model(arch, tie_word_embeddings=True)
    if how == "stock":
        return model
    if how == "held":
        return tie(model, "three_way" if arch in ("bart", "t5", "marian") else "two_way")
    names = max(shared_names(model), key=lambda names: model.get_parameter(names[0]).numel())
    return tie(tie(model, "none"), TyingConfig(groups={"mine": names}), init_from=names[0])


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("arch, by", [(arch, by) for arch, (_, classes) in CLASSES.items() for by in classes])
def test_a_language_model_that_was_a_classifier_in_between_is_tied_as_before(arch, by, how, tmp_path):
    auto = CLASSES[arch][0]
    model = written_by(arch, how)
    model.save_pretrained(tmp_path / "model")
    middle = by.from_pretrained(tmp_path / "model")
    middle.save_pretrained(tmp_path / "middle")
    again = auto.from_pretrained(tmp_path / "middle")
    assert_tied(again)
    expected = {frozenset(names) for names in shared_names(model)}
    assert {frozenset(names) for names in shared_names(again)} == expected
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    name = shared_names(model)[0][0]
    assert torch.equal(again.get_parameter(name), model.get_parameter(name))


def test_a_tie_of_layers_made_on_a_classifier_does_not_untie_the_language_model(tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    layers = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    tie(classifier, layers, init_from="mean").save_pretrained(tmp_path / "classifier")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "classifier")
    assert_tied(again)
    assert sorted(map(sorted, shared_names(again))) == [sorted([EMBED, HEAD]), layers]


def test_what_a_class_does_see_is_recorded_by_it(tmp_path):
    tie(tiny_model("bart"), "three_way").save_pretrained(tmp_path / "model")
    base = AutoModel.from_pretrained(tmp_path / "model")
    untie(base).save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert again.encoder.embed_tokens.weight is not again.decoder.embed_tokens.weight


# --- a field of that name that is another's --------------------------------------------------------------------------

FOREIGN = ["", 5, 0, True, False, [], [["scheme", "two_way"]], "soft", {"kind": "soft", "weight": 0.5}, 2.5]


@pytest.mark.parametrize("value", FOREIGN, ids=repr)
def test_a_field_that_is_no_entry_of_this_package_is_left_alone(value, tmp_path):
    model = LlamaForCausalLM(tiny_config("llama", tying=value))
    assert type(model) is LlamaForCausalLM and "tie_groups" not in vars(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tying"] == value
    assert LlamaForCausalLM.from_pretrained(tmp_path).config.tying == value
    assert_tied(model)


@pytest.mark.parametrize("value", [5, "soft", {"kind": "soft"}], ids=repr)
def test_a_tie_that_could_be_recorded_over_it_only_is_refused(value):
    model = LlamaForCausalLM(tiny_config("llama", tying=value))
    with pytest.raises(TyingError, match="config.tying is .*not an entry of this package"):
        tie(model, "two_way")
    assert type(model) is LlamaForCausalLM and model.config.tying == value


def test_the_name_of_a_scheme_in_the_place_of_an_entry_is_a_mistake():
    with pytest.raises(TyingError, match="expected a dict such as"):
        LlamaForCausalLM(tiny_config("llama", tying="two_way"))


# --- every way out that a message names ------------------------------------------------------------------------------


@pytest.fixture
def conflict(tmp_path):
    """A folder of two matrices, and the message of the load that declares them one."""
    model = untied_model("llama")
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.tying = {"version": 1, "scheme": "two_way"}
    with pytest.raises(TyingError) as error:
        LlamaForCausalLM.from_pretrained(tmp_path, config=config)
    assert "from_pretrained(..., tying={**entry, 'on_conflict': ...})" in str(error.value)
    return tmp_path, config, model


@pytest.mark.parametrize("cls", [LlamaForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("chosen", [EMBED, HEAD, None])
def test_a_conflict_is_settled_by_an_argument_of_the_load(conflict, cls, with_config, chosen):
    folder, config, model = conflict
    before = copy.deepcopy(config.to_dict())
    entry = config.tying | {"on_conflict": f"use:{chosen}" if chosen else "keep_untied"}
    given = {"config": config} if with_config else {}
    loaded = cls.from_pretrained(folder, tying=entry, **given).eval()
    assert_tied(loaded)
    if chosen:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert torch.equal(loaded.lm_head.weight, model.get_parameter(chosen))
    else:
        assert torch.equal(logits(loaded), logits(model)) and shared_names(loaded) == []
    assert config.to_dict() == before


def test_a_scheme_is_enough_and_other_arguments_of_the_load_are_kept(tmp_path):
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    loaded, info = LlamaForCausalLM.from_pretrained(
        tmp_path, tying="none", dtype=torch.float64, attn_implementation="eager", use_cache=False,
        output_loading_info=True,
    )  # fmt: skip
    assert loaded.dtype == torch.float64 and loaded.config._attn_implementation == "eager"
    assert loaded.config.use_cache is False and not info["missing_keys"]
    assert loaded.config.tying["scheme"] == "none"


def test_none_leaves_the_entry_of_the_file_out(tmp_path):
    model = tie(untied_model("llama"), TyingConfig("two_way", save_format="portable"), init_from="target")
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, tying=None, tie_word_embeddings=False)
    assert type(loaded) is LlamaForCausalLM and shared_names(loaded) == []


@pytest.mark.parametrize("flag_in_file", [True, False])
def test_a_flag_against_the_entry_has_two_ways_out_that_work(flag_in_file, tmp_path):
    model = tie(untied_model("llama"), TyingConfig("two_way", save_format="portable"), init_from="target")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": flag_in_file}))
    with pytest.raises(TyingError, match="tie_word_embeddings=True.*untie"):
        LlamaForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True).eval()
    assert_tied(loaded)
    assert torch.equal(logits(untie(loaded)), logits(model))
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_a_base_model_is_read_and_written_under_its_own_names(tmp_path):
    tie(tiny_model("llama", tie_word_embeddings=True), "two_way").save_pretrained(tmp_path / "model")
    LlamaModel.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "base")
    entry = json.loads((tmp_path / "base" / "config.json").read_text())["tying"]
    assert entry["scheme"] == "two_way" and entry["groups"] == {"embeddings": [EMBED, HEAD]}
