"""Bad input is answered by an error that names the thing and the way out, within a second, and changes nothing."""

import copy
import hashlib
import json
import struct
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from torch.nn.utils import prune
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_tying import TyingConfig, TyingConfigMixin, TyingError, assert_tied, tie, tying_report, untie

from ..forms import class_form
from ..tiny import VOCAB, layer_pair, split, tiny_config, tiny_model, untied_model

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


# --- what "unchanged" means ------------------------------------------------------------------------------------------


def picture(model: nn.Module) -> dict:
    """All that an act upon a model could change: its class, config and modules, parameters as objects and values."""
    config = getattr(model, "config", None)
    return {
        "class": type(model),
        "config": copy.deepcopy(config.to_dict()) if config is not None else None,
        "attributes": sorted(vars(model)),
        "groups": list(getattr(model, "tie_groups", [])),
        "mapping": dict(getattr(model, "all_tied_weights_keys", None) or {}),
        "parameters": {n: (id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)},
        "values": {n: digest(p) for n, p in model.named_parameters(remove_duplicate=False)},
        "modules": {n: type(m) for n, m in model.named_modules(remove_duplicate=False)},
    }


def digest(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()


def files(folder: Path) -> dict[str, str]:
    """Every file below `folder` with a hash of its bytes."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@contextmanager
def refused(*words: str, model: nn.Module | None = None, folder: Path | None = None, by=TyingError, beyond=0.0):
    """The block raises an error whose message has all of `words`, in time, with `model` and `folder` as they were.

    The promise is a second, `beyond` what transformers itself needs to come that far.
    """
    before = picture(model) if model is not None else None
    written = files(folder) if folder is not None else None
    start = time.process_time()  # of the processor: on the wall's clock a busy machine's neighbours count
    with pytest.raises(by) as error:
        yield
    assert time.process_time() - start < 1.0 + beyond
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message) < 4000, "a message is for reading"
    if model is not None:
        after = picture(model)
        assert {key: after[key] for key in after if after[key] != before[key]} == {}
    if folder is not None:
        assert files(folder) == written


@pytest.fixture
def llama():
    return untied_model("llama")


@pytest.fixture
def bart():
    return untied_model("bart")


# --- schemes and names -----------------------------------------------------------------------------------------------


class TestSchemes:
    @pytest.mark.parametrize("scheme", ["two_ways", "Two_Way", "twoway", "three-way"])
    def test_an_unknown_scheme_is_answered_by_the_nearest_and_by_all(self, llama, scheme):
        nearest = "three_way" if "three" in scheme else "two_way"
        with refused(repr(scheme), f"nearest names are '{nearest}'", "source_target", model=llama):
            tie(llama, scheme)

    @pytest.mark.parametrize("scheme", ["", "two_way ", "x" * 1_000_000])
    def test_a_string_that_resembles_nothing_is_answered_by_all_schemes(self, llama, scheme):
        with refused("Unknown tying scheme", "none, two_way, source_target, three_way", model=llama):
            tie(llama, scheme)

    @pytest.mark.parametrize("thing", [None, 5, 2.5, True, object(), {1, 2}, len, torch.zeros(2), nn.Linear(2, 2)])
    def test_something_that_is_no_declaration_says_what_one_is(self, llama, thing):
        with refused("expected a scheme", "a list of parameter names", model=llama):
            tie(llama, thing)

    @pytest.mark.parametrize("scheme", ["three_way", "source_target"])
    def test_a_scheme_that_a_causal_model_cannot_have_says_which_it_can(self, llama, scheme):
        with refused("LlamaForCausalLM", scheme, "no source", "two_way", EMBED, HEAD, model=llama):
            tie(llama, scheme, init_from="mean")

    def test_a_model_without_a_softmax_cannot_be_tied_two_way(self):
        for model in (
            AutoModel.from_config(tiny_config("llama")),
            AutoModelForSequenceClassification.from_config(tiny_config("bert")),
        ):
            with refused(type(model).__name__, "no output", "none", model=model):
                tie(model, "two_way")

    def test_vocabularies_of_two_sizes_cannot_be_one_matrix(self):
        config = tiny_config(
            "marian", share_encoder_decoder_embeddings=False, decoder_vocab_size=VOCAB + 8, tie_word_embeddings=False
        )
        from transformers import MarianMTModel

        model = MarianMTModel(config)
        with refused("encoder.embed_tokens.weight", f"({VOCAB}, 16)", f"({VOCAB + 8}, 16)", "Resize", model=model):
            tie(model, "three_way", init_from="mean")

    def test_equal_sizes_are_not_equal_vocabularies(self, bart):
        def tokenizer(words):
            vocabulary = {word: i for i, word in enumerate(words)}
            return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="cat")))

        source, target = tokenizer(["cat", "dog", "eel"]), tokenizer(["cat", "eel", "dog"])
        for scheme in ("three_way", "source_target"):
            with refused("different vocabularies", "'dog': 1 and 2", "joint vocabulary", model=bart):
                tie(bart, scheme, init_from="mean", tokenizer=source, target_tokenizer=target)
        tie(bart, "three_way", init_from="mean", tokenizer=source, target_tokenizer=tokenizer(["cat", "dog", "eel"]))
        assert_tied(bart)


class TestNames:
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
    def test_an_unknown_name_is_answered_by_the_nearest(self, llama, name, nearest):
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
    def test_names_are_literal_and_never_patterns_or_attributes(self, llama, name):
        with refused(repr(name)[1:-1], "does not exist", model=llama):
            tie(llama, [UP, name])
        entry = {"version": 1, "groups": {"layers": [UP, name]}}
        with refused(repr(name)[1:-1], "does not exist"):
            LlamaForCausalLM(tiny_config("llama", tying=entry))

    def test_a_buffer_is_said_to_be_one(self, llama):
        llama.model.register_buffer("scale", torch.ones(16))
        with refused("model.scale", "is a buffer", model=llama):
            tie(llama, ["model.scale", "model.norm.weight"])

    def test_a_group_needs_two_names(self, llama):
        for names in ([HEAD], [], ()):
            with refused("at least two", model=llama):
                tie(llama, names)
        with refused("'softmax'", "['lm_head.weight']", "at least two", model=llama):
            tie(llama, {"layers": layer_pair(llama), "softmax": [HEAD]})

    def test_members_are_strings(self, llama):
        for member in (5, None, b"lm_head.weight", ["lm_head.weight"], "", llama.lm_head.weight, "x" * 10_000):
            with refused("expected a parameter name", model=llama):
                tie(llama, [EMBED, member])

    def test_a_name_stands_in_one_group_once(self, llama):
        first, second = layer_pair(llama)
        with refused(repr(first), "twice in", model=llama):
            tie(llama, {"layers": [first, second, first]})
        with refused(repr(first), "'one' and 'two'", "Merge the groups", model=llama):
            tie(llama, {"one": [first, second], "two": [first, UP]})

    def test_two_spellings_of_one_parameter_are_one_name(self, llama):
        with refused("'lm_head'", "'lm_head.weight'", "module", model=llama):
            tie(llama, ["lm_head", "lm_head.weight"])
        with refused("mean the same parameter", "embed_tokens", model=llama):
            tie(llama, ["embed_tokens.weight", EMBED])

    def test_modules_of_different_build_are_told_apart(self, llama):
        with refused("do not have the same parameters", "model.layers.0.mlp", "one by one", model=llama):
            tie(llama, ["model.layers.0.mlp", "model.layers.1.self_attn"])
        with refused("do not have the same parameters", model=llama):
            tie(llama, ["model", "model.layers.0"])

    def test_shapes_must_be_equal(self, llama):
        with refused(repr(UP), "(32, 16)", repr(DOWN), "(16, 32)", "leave the name out", model=llama):
            tie(llama, [UP, DOWN], init_from="mean")

    def test_dtypes_must_be_equal(self, llama):
        llama.lm_head.to(torch.bfloat16)
        with refused(EMBED, "torch.float32", HEAD, "torch.bfloat16", "convert", model=llama):
            tie(llama, "two_way", init_from="target")

    def test_one_bad_group_among_good_ones_stops_them_all(self, llama):
        good = {
            f"layer {part}": [f"model.layers.{i}.mlp.{part}.weight" for i in (0, 1)]
            for part in ("up_proj", "gate_proj")
        }
        with refused("'bad'", model=llama):
            tie(llama, good | {"bad": [UP, DOWN]}, init_from="mean")
        with refused("nowhere", model=llama):
            tie(llama, good | {"bad": [DOWN, "nowhere"]}, init_from="mean")

    def test_a_root_is_the_first_name_and_nothing_else_declares_one(self, llama):
        for group in ({"root": EMBED, "names": [HEAD, UP]}, {"root": "x"}):
            with refused("'softmax'", "expected a name and a list of parameter names", model=llama):
                tie(llama, {"softmax": group})
        with refused("unknown key 'root'", "'groups'"):
            TyingConfig.from_dict({"version": 1, "root": EMBED, "groups": {"softmax": [HEAD, UP]}})


# --- values ----------------------------------------------------------------------------------------------------------


class TestValues:
    @pytest.mark.parametrize("arch, scheme", [("llama", "two_way"), ("bart", "three_way"), ("bart", "source_target")])
    def test_of_two_trained_matrices_none_is_dropped_unasked(self, arch, scheme):
        model = untied_model(arch)
        with refused(
            "different values", "largest difference", "init_from='source' | 'target' | 'output' | 'mean'", model=model
        ):
            tie(model, scheme)

    def test_that_holds_for_layers_too(self, llama):
        pair = layer_pair(llama)
        with refused(*pair, "init_from=", model=llama):
            tie(llama, pair)

    @pytest.mark.parametrize(
        "init_from", ["targets", "Mean", "lm_head", "model.embed_tokens.wieght", "", UP, 5, ["mean"]]
    )
    def test_an_unknown_init_from_says_what_is_expected(self, llama, init_from):
        with refused(repr(init_from), "expected a role, 'mean', or a name", model=llama):
            tie(llama, "two_way", init_from=init_from)

    def test_a_role_that_the_model_has_not_cannot_be_the_source_of_values(self, llama):
        with refused("'source'", "LlamaForCausalLM", "'target'", model=llama):
            tie(llama, "two_way", init_from="source")

    def test_init_from_must_reach_every_group_whose_names_differ(self, llama):
        config = TyingConfig(scheme="two_way", groups={"layers": layer_pair(llama)})
        with refused("'layers'", "different values", "init_from", model=llama):
            tie(llama, config, init_from="target")

    @pytest.mark.parametrize("on_conflict", ["keep", "use", "use lm_head.weight", "ERROR", "", 5, ["error"], True])
    def test_an_unknown_on_conflict_is_refused(self, llama, on_conflict):
        with refused("on_conflict", "'error', 'keep_untied' or 'use:<parameter name>'", model=llama):
            tie(llama, "two_way", init_from="target", on_conflict=on_conflict)

    @pytest.mark.parametrize("save_format", ["dedupe", "Portable", "", 5, ["dedup"], True])
    def test_an_unknown_save_format_is_refused(self, save_format):
        with refused("save_format", "'dedup' or 'portable'"):
            TyingConfig(save_format=save_format)


# --- models that cannot be tied now ----------------------------------------------------------------------------------


class TestModels:
    def test_a_model_on_the_meta_device_has_no_values_to_tie(self):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=False))
        with refused(EMBED, "meta device", "Load the weights first", "config.tying", model=model):
            tie(model, "two_way")

    def test_one_side_on_the_meta_device_is_enough_to_refuse(self, llama):
        llama.lm_head.to("meta")
        with refused(HEAD, "meta device", model=llama):
            tie(llama, "two_way", init_from="target")

    def test_a_dynamically_quantised_head_is_named(self, llama):
        torch.ao.quantization.quantize_dynamic(
            llama, {"lm_head": torch.ao.quantization.default_dynamic_qconfig}, inplace=True
        )
        assert "quant" in type(llama.lm_head).__module__
        with refused("lm_head", "quantised", model=llama):
            tie(llama, "two_way", init_from="target")
        with refused("lm_head.weight", "quantised", model=llama):
            tie(llama, [EMBED, HEAD], init_from=EMBED)

    def test_an_integer_parameter_is_refused(self, llama):
        llama.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 16, dtype=torch.int8), requires_grad=False)
        with refused("lm_head.weight", "int8", "before quantising", model=llama):
            tie(llama, "two_way", init_from="target")

    def test_a_pruned_side_and_a_parametrised_side_are_named(self, llama):
        prune.l1_unstructured(llama.lm_head, "weight", 0.5)
        with refused(HEAD, "pruned", "prune.remove", model=llama):
            tie(llama, "two_way", init_from="target")
        other = untied_model("llama")
        torch.nn.utils.parametrizations.weight_norm(other.lm_head)
        with refused(HEAD, "parametrised", "remove_parametrizations", model=other):
            tie(other, "two_way", init_from="target")

    def test_an_adapted_model_is_told_to_be_tied_before(self, llama):
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(llama, LoraConfig(target_modules=["q_proj"], r=2))
        for model in (adapted, adapted.get_base_model()):
            with refused("adapters", "before get_peft_model", "unload()", model=model):
                tie(model, "two_way", init_from="target")
            with refused("adapters", "unload()", model=model):
                untie(model)

    @pytest.mark.parametrize(
        "thing", [None, "gpt2", 5, nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)), LlamaForCausalLM]
    )
    def test_something_else_than_a_model_is_named_by_its_type(self, thing):
        for act in (lambda: tie(thing, "two_way"), lambda: untie(thing), lambda: assert_tied(thing)):
            with refused("PreTrainedModel", type(thing).__name__):
                act()

    def test_untie_names_what_is_not_tied_and_what_does_not_exist(self, llama):
        tie(llama, "two_way", init_from="target")
        with refused(repr(UP), "is not tied", model=llama):
            untie(llama, [HEAD, UP])
        with refused("'lm_head.wieght'", "does not exist", HEAD, model=llama):
            untie(llama, "lm_head.wieght")
        for names in (5, [5], [None], {"lm_head": 1}):
            with refused("Cannot untie", model=llama):
                untie(llama, names)


# --- config.json -----------------------------------------------------------------------------------------------------

DEEP = 300  # json reads it; a reader that follows it by recursion would soon be at the end of its stack


def nested(kind: str, depth: int = DEEP):
    value = "lm_head.weight"
    for _ in range(depth):
        value = [value] if kind == "list" else {"groups": value}
    return value


#: An entry, and what the message must name.
ENTRIES = {
    # the entry itself
    "a string": ("two_way", "'two_way'"),
    "an empty string": ("", "''"),
    "a number": (5, "5"),
    "zero": (0, "0"),
    "true": (True, "True"),
    "false": (False, "False"),
    "a list": ([], "list"),
    "a list of pairs": ([["scheme", "two_way"]], "list"),
    # versions
    "a newer version": ({"version": 2, "scheme": "two_way"}, "version 2", "pip install -U hf-tying"),
    "a far newer version": ({"version": 10**30}, "version", "pip install -U hf-tying"),
    "a version of digits without end": ({"version": 10**4000}, "version"),
    "a version in words": ({"version": "1"}, "version '1'"),
    "a broken version": ({"version": 1.5}, "version 1.5"),
    "a negative version": ({"version": -1}, "version -1"),
    "version null": ({"version": None}, "version None"),
    "version true": ({"version": True}, "version True"),
    "version not a number": ({"version": float("nan")}, "version nan"),
    "a version list": ({"version": [1]}, "version of type list"),
    # keys
    "an unknown key": ({"version": 1, "schema": "two_way"}, "'schema'", "'scheme'"),
    "a key of a megabyte": ({"version": 1, "k" * 2**20: 1}, "unknown key"),
    "code": ({"version": 1, "__reduce__": ["os.system", ["true"]]}, "'__reduce__'"),
    # scheme
    "a scheme with a typo": ({"version": 1, "scheme": "tow_way"}, "'tow_way'", "'two_way'"),
    "a scheme number": ({"version": 1, "scheme": 2}, "scheme 2"),
    "a scheme list": ({"version": 1, "scheme": ["two_way"]}, "scheme", "list"),
    "a scheme dict": ({"version": 1, "scheme": {"two_way": True}}, "scheme", "dict"),
    "a scheme true": ({"version": 1, "scheme": True}, "scheme True"),
    # groups
    "groups in words": ({"version": 1, "groups": "lm_head.weight"}, "`groups`"),
    "groups number": ({"version": 1, "groups": 5}, "`groups`"),
    "groups list": ({"version": 1, "groups": [[EMBED, HEAD]]}, "`groups`", "list"),
    "groups false": ({"version": 1, "groups": False}, "`groups`"),
    "a group in words": ({"version": 1, "groups": {"softmax": HEAD}}, "'softmax'"),
    "a group null": ({"version": 1, "groups": {"softmax": None}}, "'softmax'"),
    "a group dict": ({"version": 1, "groups": {"softmax": {EMBED: HEAD}}}, "'softmax'"),
    "a group number": ({"version": 1, "groups": {"softmax": 5}}, "'softmax'"),
    "a member number": ({"version": 1, "groups": {"softmax": [EMBED, 5]}}, "'softmax'", "5"),
    "a member null": ({"version": 1, "groups": {"softmax": [EMBED, None]}}, "'softmax'", "None"),
    "a member list": ({"version": 1, "groups": {"softmax": [EMBED, [HEAD]]}}, "'softmax'", "list"),
    "a member dict": ({"version": 1, "groups": {"softmax": [EMBED, {}]}}, "'softmax'", "dict"),
    "an empty member": ({"version": 1, "groups": {"softmax": [EMBED, ""]}}, "'softmax'", "''"),
    "a group of one": ({"version": 1, "groups": {"softmax": [HEAD]}}, "'softmax'", "at least two"),
    "an empty group": ({"version": 1, "groups": {"softmax": []}}, "'softmax'", "at least two"),
    "a name twice": ({"version": 1, "groups": {"softmax": [HEAD, HEAD]}}, HEAD, "twice in 'softmax'"),
    "a name in two groups": ({"version": 1, "groups": {"a": [EMBED, HEAD], "b": [UP, HEAD]}}, HEAD, "'a' and 'b'"),
    # other fields
    "on_conflict number": ({"version": 1, "scheme": "two_way", "on_conflict": 5}, "on_conflict 5"),
    "on_conflict list": ({"version": 1, "scheme": "two_way", "on_conflict": ["error"]}, "on_conflict", "list"),
    "on_conflict with a typo": ({"version": 1, "scheme": "two_way", "on_conflict": "eror"}, "'eror'"),
    "save_format number": ({"version": 1, "scheme": "two_way", "save_format": 5}, "save_format 5"),
    "save_format dict": ({"version": 1, "scheme": "two_way", "save_format": {}}, "save_format", "dict"),
    # hostile sizes
    "a million names": ({"version": 1, "groups": {"all": [f"w{i}" for i in range(1_000_000)]}}, "50000 names"),
    "a million equal names": ({"version": 1, "groups": {"all": [HEAD] * 1_000_000}}, "50000 names"),
    "many groups": ({"version": 1, "groups": {str(i): [f"a{i}", f"b{i}"] for i in range(30_000)}}, "50000 names"),
    "many empty groups": ({"version": 1, "groups": {str(i): [] for i in range(50_000)}}, "at least two"),
    "a name of megabytes": ({"version": 1, "groups": {"softmax": [HEAD, "a." * 2**20]}}, "'softmax'"),
    "a group's name of megabytes": ({"version": 1, "groups": {"g" * 2**21: [HEAD]}}, "at least two"),
    "a deep list": ({"version": 1, "groups": {"softmax": [HEAD, nested("list")]}}, "'softmax'", "list"),
    "a deep scheme": ({"version": 1, "scheme": nested("list")}, "scheme", "list"),
    "deep groups": ({"version": 1, "groups": nested("dict")}, "'groups'"),
    "a deep entry": (nested("list"), "list"),
}
# Python's json reads numbers up to 4300 digits; a million names come as a file once.
_IN_FILES = [case for case in ENTRIES if case not in ("a version of digits without end", "a million equal names")]
_BIG = ("a million names", "many groups", "many empty groups", "a key of a megabyte", "fifty thousand names")

#: Entries that are well formed and do not fit the model.
UNFIT = {
    "an unknown name": ({"version": 1, "groups": {"softmax": [EMBED, "lm_head.wieght"]}}, "lm_head.wieght", HEAD),
    "a pattern": ({"version": 1, "groups": {"layers": [UP, "model.layers.*"]}}, "model.layers.*", "does not exist"),
    "other shapes": ({"version": 1, "groups": {"layers": [UP, DOWN]}}, "0.mlp.up_proj", "1.mlp.down_proj", "(16, 32)"),
    "a scheme without its roles": ({"version": 1, "scheme": "three_way"}, "three_way", "no source"),
    "fifty thousand names": ({"version": 1, "groups": {"a": [f"w.{i}.weight" for i in range(50_000)]}}, "w.0.weight"),
    "long names": ({"version": 1, "groups": {"a": ["a." * 255 + "b", "b." * 255 + "c"]}}, "does not exist"),
    "like names": (
        {"version": 1, "groups": {"a": [f"model.layers.{'0' * i}.mlp.up_proj.weight" for i in range(2, 480)]}},
        "does not exist",
    ),
}


def tied_folder(folder: Path, save_format: str = "portable") -> Path:
    model = tie(untied_model("llama"), TyingConfig(scheme="two_way", save_format=save_format), init_from="target")
    model.save_pretrained(folder)
    return folder


def set_entry(folder: Path, entry) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tying": entry}))


class TestEntries:
    @pytest.mark.parametrize("case", ENTRIES)
    def test_a_wrong_entry_is_refused_by_the_reader(self, case):
        entry, *words = ENTRIES[case]
        with refused(*words):
            TyingConfig.from_dict(entry)

    @pytest.mark.parametrize("case", [c for c in ENTRIES | UNFIT if c not in _BIG])
    def test_a_wrong_entry_stops_a_stock_class_and_a_class_over_the_mixin(self, case):
        entry, *words = (ENTRIES | UNFIT)[case]
        with refused(*words):
            LlamaForCausalLM(tiny_config("llama", tying=entry))
        cls = class_form(LlamaForCausalLM)
        with refused(*words):
            cls(cls.config_class(**tiny_config("llama").to_diff_dict(), tying=entry))

    @pytest.mark.parametrize("case", [*_IN_FILES, *UNFIT])
    def test_a_wrong_entry_in_a_file_stops_the_load_and_leaves_the_file(self, case, tmp_path):
        entry, *words = (ENTRIES | UNFIT)[case]
        set_entry(tied_folder(tmp_path), entry)
        own = 0.0
        if case in _BIG:  # transformers reads, copies and copies again any config of that size
            other = tied_folder(tmp_path / "other")
            config = json.loads((other / "config.json").read_text())
            del config["tying"]
            (other / "config.json").write_text(json.dumps(config | {"other": entry, "tie_word_embeddings": True}))
            start = time.process_time()
            AutoModelForCausalLM.from_pretrained(other)
            own = time.process_time() - start
        with refused(*words, folder=tmp_path, beyond=own):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize("case", [*_IN_FILES, *UNFIT])
    def test_a_wrong_entry_in_a_file_stops_the_report(self, case, tmp_path):
        entry, *words = (ENTRIES | UNFIT)[case]
        set_entry(tied_folder(tmp_path), entry)
        with refused(*words, folder=tmp_path):
            tying_report(tmp_path)

    def test_the_most_names_that_are_read_at_all_are_refused_in_time_by_a_deep_model(self):
        entry, *words = UNFIT["fifty thousand names"]
        with refused(*words):
            LlamaForCausalLM(tiny_config("llama", num_hidden_layers=32, tying=entry))

    def test_nesting_beyond_what_json_reads_is_refused(self, tmp_path):
        tied_folder(tmp_path)
        text = (tmp_path / "config.json").read_text()
        deep = '{"a":' * 100_000 + "1" + "}" * 100_000
        (tmp_path / "config.json").write_text(text[: text.rindex("}")] + ', "tying": ' + deep + "}")
        with refused("config.json", "nested too deep", folder=tmp_path):
            tying_report(tmp_path)
        # transformers reads the file before anything of ours can: Python's own error, for any config so deep.
        with refused("recursion", folder=tmp_path, by=(TyingError, RecursionError)):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_an_entry_in_the_sub_config_of_a_composite_model_is_refused_too(self):
        config = tiny_config("llava")
        config.text_config.tying = {"version": 1, "scheme": "four_way"}
        with refused("'four_way'"):
            type(tiny_model("llava"))(config)

    def test_a_wrong_entry_given_by_hand_is_refused_at_the_next_act(self, tmp_path):
        model = tie(untied_model("llama"), "two_way", init_from="target")
        model.config.tying = {"version": 1, "groups": {"softmax": HEAD}}
        for act in (
            lambda: assert_tied(model),
            lambda: model.save_pretrained(tmp_path),
            lambda: model.resize_token_embeddings(70),
        ):
            with refused("'softmax'", model=model, folder=tmp_path):
                act()

    def test_a_mixin_config_refuses_what_its_file_says(self, tmp_path):
        class TiedConfig(TyingConfigMixin, LlamaConfig):
            pass

        TiedConfig(tying={"version": 1, "scheme": "two_way"}).save_pretrained(tmp_path)
        for case in ("a newer version", "a list", "a million names", "a deep list"):
            entry, *words = ENTRIES[case]
            set_entry(tmp_path, entry)
            with refused(*words, folder=tmp_path):
                TiedConfig.from_pretrained(tmp_path)


# --- weight files ----------------------------------------------------------------------------------------------------


class TestWeightFiles:
    @pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 500, -1, -1000])
    def test_a_truncated_file_is_named_before_any_weight_is_loaded(self, keep, tmp_path):
        path = tied_folder(tmp_path) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with refused("model.safetensors", "truncated", "save it again", folder=tmp_path):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_a_truncated_shard_is_named(self, tmp_path):
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
    def test_a_corrupted_file_is_named(self, change, tmp_path):
        path = tied_folder(tmp_path) / "model.safetensors"
        before = path.read_bytes()
        path.write_bytes(change(before))
        assert path.read_bytes() != before
        with refused("model.safetensors", folder=tmp_path):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        with refused("model.safetensors", folder=tmp_path):
            tying_report(tmp_path)

    def test_a_name_of_another_shape_is_an_error_or_as_asked_left_out(self, tmp_path):
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

    def test_a_whole_group_of_another_shape_is_new_where_asked(self, tmp_path):
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
    def test_a_conflict_settled_by_a_name_outside_the_group_is_an_error(self, on_conflict, tmp_path):
        path = tied_folder(tmp_path) / "model.safetensors"
        tensors = load_file(path)
        tensors[HEAD] += 1
        save_file(tensors, path, {"format": "pt"})
        entry = json.loads((tmp_path / "config.json").read_text())["tying"]
        set_entry(tmp_path, entry | {"on_conflict": on_conflict})
        with refused("on_conflict", on_conflict, EMBED, HEAD, folder=tmp_path):
            AutoModelForCausalLM.from_pretrained(tmp_path)


class TestStateDicts:
    @pytest.mark.parametrize("assign", [False, True])
    def test_a_state_dict_with_two_values_for_one_parameter_changes_nothing(self, assign):
        model = tie(untied_model("llama"), "two_way", init_from="target")
        state = {name: value.clone() for name, value in model.state_dict().items()}
        state[HEAD] += 1
        for value in state.values():
            value += 0.5
        with refused(EMBED, HEAD, "largest difference 1 ", "untie", model=model):
            model.load_state_dict(state, assign=assign)

    def test_a_broken_tie_writes_nothing_over_what_is_there(self, tmp_path):
        model = tie(untied_model("llama"), "two_way", init_from="target")
        model.save_pretrained(tmp_path)
        split(model, [HEAD])
        with refused(HEAD, EMBED, "found two", "untie", model=model, folder=tmp_path):
            model.save_pretrained(tmp_path)
        with refused(HEAD, "found two", model=model, folder=tmp_path):
            model.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()
