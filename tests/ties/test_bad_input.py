"""Bad arguments of `tie` and `untie` are refused by an error that names the thing and the way out; nothing changes."""

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from torch.nn.utils import prune
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_tying import TyingConfig, assert_tied, tie, untie

from ..tiny import VOCAB, layer_pair, tiny_config, untied_model
from .refusals import DOWN, EMBED, HEAD, UP, refused

# --- schemes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["two_ways", "Two_Way", "twoway", "three-way"])
def test_an_unknown_scheme_is_answered_by_the_nearest_and_by_all(llama, scheme):
    nearest = "three_way" if "three" in scheme else "two_way"
    with refused(repr(scheme), f"nearest names are '{nearest}'", "source_target", model=llama):
        tie(llama, scheme)


@pytest.mark.parametrize("scheme", ["", "two_way ", "x" * 1_000_000])
def test_a_string_that_resembles_no_scheme_is_answered_by_all_of_them(llama, scheme):
    with refused("Unknown tying scheme", "none, two_way, source_target, three_way", model=llama):
        tie(llama, scheme)


@pytest.mark.parametrize("thing", [None, 5, 2.5, True, object(), {1, 2}, len, torch.zeros(2), nn.Linear(2, 2)])
def test_something_that_is_no_declaration_says_what_one_is(llama, thing):
    with refused("expected a scheme", "a list of parameter names", model=llama):
        tie(llama, thing)


@pytest.mark.parametrize("scheme", ["three_way", "source_target"])
def test_a_scheme_that_a_causal_model_cannot_have_says_which_it_can(llama, scheme):
    with refused("LlamaForCausalLM", scheme, "no source", "two_way", EMBED, HEAD, model=llama):
        tie(llama, scheme, init_from="mean")


def test_a_model_without_a_softmax_cannot_be_tied_two_way():
    for model in (
        AutoModel.from_config(tiny_config("llama")),
        AutoModelForSequenceClassification.from_config(tiny_config("bert")),
    ):
        with refused(type(model).__name__, "no output", "none", model=model):
            tie(model, "two_way")


def test_vocabularies_of_two_sizes_cannot_be_one_matrix():
    config = tiny_config(
        "marian", share_encoder_decoder_embeddings=False, decoder_vocab_size=VOCAB + 8, tie_word_embeddings=False
    )
    from transformers import MarianMTModel

    model = MarianMTModel(config)
    with refused("encoder.embed_tokens.weight", f"({VOCAB}, 16)", f"({VOCAB + 8}, 16)", "Resize", model=model):
        tie(model, "three_way", init_from="mean")


def test_equal_sizes_are_not_equal_vocabularies(bart):
    def tokenizer(words):
        vocabulary = {word: i for i, word in enumerate(words)}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="cat")))

    source, target = tokenizer(["cat", "dog", "eel"]), tokenizer(["cat", "eel", "dog"])
    for scheme in ("three_way", "source_target"):
        with refused("different vocabularies", "'dog': 1 and 2", "joint vocabulary", model=bart):
            tie(bart, scheme, init_from="mean", tokenizer=source, target_tokenizer=target)
    tie(bart, "three_way", init_from="mean", tokenizer=source, target_tokenizer=tokenizer(["cat", "dog", "eel"]))
    assert_tied(bart)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("lm_head.wieght", "lm_head.weight"),
        ("model.embed_token.weight", "model.embed_tokens.weight"),
        ("model.layer.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("transformer.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
        ("model.layers.7.mlp.up_proj.weight", "mlp.up_proj.weight"),
    ],
)
def test_an_unknown_name_is_answered_by_the_nearest(llama, name, nearest):
    with refused(repr(name), "does not exist in LlamaForCausalLM", "the nearest names are", nearest, model=llama):
        tie(llama, [UP, name])


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.*.mlp.up_proj.weight",
        r"model\.layers\.\d+\.mlp\.up_proj\.weight",
        ".*",
        "^lm_head",
        "lm_head.weight$",
        "model.layers.[01].mlp.up_proj.weight",
        "(a+)+$",
        "%s",
        "{}",
        "../model",
        "model.layers.0.mlp.up_proj.weight\n",
        "__class__",
        "model.__dict__",
        "model..embed_tokens",
        ".",
        "model.embed_tokens.",
    ],
)
def test_names_are_literal_and_never_patterns_or_attributes(llama, name):
    with refused(repr(name)[1:-1], "does not exist", model=llama):
        tie(llama, [UP, name])
    entry = {"version": 1, "groups": {"layers": [UP, name]}}
    with refused(repr(name)[1:-1], "does not exist"):
        LlamaForCausalLM(tiny_config("llama", tying=entry))


def test_a_buffer_is_said_to_be_one(llama):
    llama.model.register_buffer("scale", torch.ones(16))
    with refused("model.scale", "is a buffer", model=llama):
        tie(llama, ["model.scale", "model.norm.weight"])


def test_a_group_needs_two_names(llama):
    for names in ([HEAD], [], ()):
        with refused("at least two", model=llama):
            tie(llama, names)
    with refused("'softmax'", "['lm_head.weight']", "at least two", model=llama):
        tie(llama, {"layers": layer_pair(llama), "softmax": [HEAD]})


def test_members_of_a_group_are_strings(llama):
    for member in (5, None, b"lm_head.weight", ["lm_head.weight"], "", llama.lm_head.weight, "x" * 10_000):
        with refused("expected a parameter name", model=llama):
            tie(llama, [EMBED, member])


def test_a_name_stands_in_one_group_once(llama):
    first, second = layer_pair(llama)
    with refused(repr(first), "twice in", model=llama):
        tie(llama, {"layers": [first, second, first]})
    with refused(repr(first), "'one' and 'two'", "Merge the groups", model=llama):
        tie(llama, {"one": [first, second], "two": [first, UP]})


def test_two_spellings_of_one_parameter_are_one_name(llama):
    with refused("'lm_head'", "'lm_head.weight'", "module", model=llama):
        tie(llama, ["lm_head", "lm_head.weight"])
    with refused("mean the same parameter", "embed_tokens", model=llama):
        tie(llama, ["embed_tokens.weight", EMBED])


def test_modules_of_different_build_are_told_apart(llama):
    with refused("do not have the same parameters", "model.layers.0.mlp", "one by one", model=llama):
        tie(llama, ["model.layers.0.mlp", "model.layers.1.self_attn"])
    with refused("do not have the same parameters", model=llama):
        tie(llama, ["model", "model.layers.0"])


def test_the_shapes_in_a_group_must_be_equal(llama):
    with refused(repr(UP), "(32, 16)", repr(DOWN), "(16, 32)", "leave the name out", model=llama):
        tie(llama, [UP, DOWN], init_from="mean")


def test_the_dtypes_in_a_group_must_be_equal(llama):
    llama.lm_head.to(torch.bfloat16)
    with refused(EMBED, "torch.float32", HEAD, "torch.bfloat16", "convert", model=llama):
        tie(llama, "two_way", init_from="target")


def test_one_bad_group_among_good_ones_stops_them_all(llama):
    good = {
        f"layer {part}": [f"model.layers.{i}.mlp.{part}.weight" for i in (0, 1)] for part in ("up_proj", "gate_proj")
    }
    with refused("'bad'", model=llama):
        tie(llama, good | {"bad": [UP, DOWN]}, init_from="mean")
    with refused("nowhere", model=llama):
        tie(llama, good | {"bad": [DOWN, "nowhere"]}, init_from="mean")


def test_a_root_is_the_first_name_and_nothing_else_declares_one(llama):
    for group in ({"root": EMBED, "names": [HEAD, UP]}, {"root": "x"}):
        with refused("'softmax'", "expected a name and a list of parameter names", model=llama):
            tie(llama, {"softmax": group})
    with refused("unknown key 'root'", "'groups'"):
        TyingConfig.from_dict({"version": 1, "root": EMBED, "groups": {"softmax": [HEAD, UP]}})


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, scheme", [("llama", "two_way"), ("bart", "three_way"), ("bart", "source_target")])
def test_of_two_trained_matrices_none_is_dropped_unasked(arch, scheme):
    model = untied_model(arch)
    with refused(
        "different values", "largest difference", "init_from='source' | 'target' | 'output' | 'mean'", model=model
    ):
        tie(model, scheme)


def test_of_two_trained_layers_none_is_dropped_unasked(llama):
    pair = layer_pair(llama)
    with refused(*pair, "init_from=", model=llama):
        tie(llama, pair)


@pytest.mark.parametrize(
    "init_from", ["targets", "Mean", "lm_heads", "model.embed_tokens.wieght", "", UP, 5, ["mean"]]
)
def test_an_unknown_init_from_says_what_is_expected(llama, init_from):
    with refused(repr(init_from), "expected a role, 'mean', or a name", model=llama):
        tie(llama, "two_way", init_from=init_from)


def test_a_role_that_the_model_has_not_cannot_be_the_source_of_values(llama):
    with refused("'source'", "LlamaForCausalLM", "'target'", model=llama):
        tie(llama, "two_way", init_from="source")


def test_init_from_must_reach_every_group_whose_names_differ(llama):
    config = TyingConfig(scheme="two_way", groups={"layers": layer_pair(llama)})
    with refused("'layers'", "different values", "init_from", model=llama):
        tie(llama, config, init_from="target")


@pytest.mark.parametrize("on_conflict", ["keep", "use", "use lm_head.weight", "ERROR", "", 5, ["error"], True])
def test_an_unknown_on_conflict_is_refused(llama, on_conflict):
    with refused("on_conflict", "'error', 'keep_untied' or 'use:<parameter name>'", model=llama):
        tie(llama, "two_way", init_from="target", on_conflict=on_conflict)


@pytest.mark.parametrize("save_format", ["dedupe", "Portable", "", 5, ["dedup"], True])
def test_an_unknown_save_format_is_refused(save_format):
    with refused("save_format", "'dedup' or 'portable'"):
        TyingConfig(save_format=save_format)


# --- models that cannot be tied now ----------------------------------------------------------------------------------


def test_a_model_on_the_meta_device_has_no_values_to_tie():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=False))
    with refused(EMBED, "meta device", "Load the weights first", "config.tying", model=model):
        tie(model, "two_way")


def test_one_side_on_the_meta_device_is_enough_to_refuse(llama):
    llama.lm_head.to("meta")
    with refused(HEAD, "meta device", model=llama):
        tie(llama, "two_way", init_from="target")


def test_a_dynamically_quantised_head_is_named(llama):
    torch.ao.quantization.quantize_dynamic(
        llama, {"lm_head": torch.ao.quantization.default_dynamic_qconfig}, inplace=True
    )
    assert "quant" in type(llama.lm_head).__module__
    with refused("lm_head", "quantised", model=llama):
        tie(llama, "two_way", init_from="target")
    with refused("lm_head.weight", "quantised", model=llama):
        tie(llama, [EMBED, HEAD], init_from=EMBED)


def test_an_integer_parameter_is_refused(llama):
    llama.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 16, dtype=torch.int8), requires_grad=False)
    with refused("lm_head.weight", "int8", "before quantising", model=llama):
        tie(llama, "two_way", init_from="target")


def test_a_pruned_side_and_a_parametrised_side_are_named(llama):
    prune.l1_unstructured(llama.lm_head, "weight", 0.5)
    with refused(HEAD, "pruned", "prune.remove", model=llama):
        tie(llama, "two_way", init_from="target")
    other = untied_model("llama")
    torch.nn.utils.parametrizations.weight_norm(other.lm_head)
    with refused(HEAD, "parametrised", "remove_parametrizations", model=other):
        tie(other, "two_way", init_from="target")


def test_an_adapted_model_is_told_to_be_tied_before(llama):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(llama, LoraConfig(target_modules=["q_proj"], r=2))
    for model in (adapted, adapted.get_base_model()):
        with refused("adapters", "before get_peft_model", "unload()", model=model):
            tie(model, "two_way", init_from="target")
        with refused("adapters", "unload()", model=model):
            untie(model)


@pytest.mark.parametrize("thing", [None, "gpt2", 5, LlamaForCausalLM])
def test_something_else_than_a_model_is_named_by_its_type(thing):
    for act in (lambda: tie(thing, "two_way"), lambda: untie(thing), lambda: assert_tied(thing)):
        with refused("PreTrainedModel", type(thing).__name__):
            act()


def test_untie_names_what_is_not_tied_and_what_does_not_exist(llama):
    tie(llama, "two_way", init_from="target")
    with refused(repr(UP), "is not tied", model=llama):
        untie(llama, [HEAD, UP])
    with refused("'lm_head.wieght'", "does not exist", HEAD, model=llama):
        untie(llama, "lm_head.wieght")
    for names in (5, [5], [None], {"lm_head": 1}):
        with refused("Cannot untie", model=llama):
            untie(llama, names)
