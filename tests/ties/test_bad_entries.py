"""A wrong `tying` entry in a config is refused by whatever reads it, within a second."""

import json
import time

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_tying import TyingConfig, TyingConfigMixin, TyingError, assert_tied, tie, tying_report

from ..forms import class_form
from ..tiny import tiny_config, tiny_model, untied_model
from .refusals import DOWN, EMBED, HEAD, UP, refused, set_entry, tied_folder

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
#: Fields of that name that are no entries of this package, and are left alone where they are not given as one.
_FOREIGN = ("an empty string", "a number", "zero", "true", "false", "a list", "a list of pairs", "a deep entry")
_IN_FILES = [case for case in _IN_FILES if case not in _FOREIGN]
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


@pytest.mark.parametrize("case", ENTRIES)
def test_a_wrong_entry_is_refused_by_the_reader(case):
    entry, *words = ENTRIES[case]
    with refused(*words):
        TyingConfig.from_dict(entry)


@pytest.mark.parametrize("case", [c for c in ENTRIES | UNFIT if c not in (*_BIG, *_FOREIGN)])
def test_a_wrong_entry_stops_a_stock_class_and_a_class_over_the_mixin(case):
    entry, *words = (ENTRIES | UNFIT)[case]
    with refused(*words):
        LlamaForCausalLM(tiny_config("llama", tying=entry))
    cls = class_form(LlamaForCausalLM)
    with refused(*words):
        cls(cls.config_class(**tiny_config("llama").to_diff_dict(), tying=entry))


@pytest.mark.parametrize("case", [*_IN_FILES, *UNFIT])
def test_a_wrong_entry_in_a_file_stops_the_load_and_leaves_the_file(case, tmp_path):
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
def test_a_wrong_entry_in_a_file_stops_the_report(case, tmp_path):
    entry, *words = (ENTRIES | UNFIT)[case]
    set_entry(tied_folder(tmp_path), entry)
    if case == "other shapes":  # what the files hold is a finding
        report = tying_report(tmp_path)
        assert not report.ok and "have the shapes [32, 16] and [16, 32]" in report.findings[0].message
        return
    if case == "a million names":  # refused before it is read as JSON
        words = ["bytes: more than"]
    with refused(*words, folder=tmp_path):
        tying_report(tmp_path)


def test_the_most_names_that_are_read_at_all_are_refused_in_time_by_a_deep_model():
    entry, *words = UNFIT["fifty thousand names"]
    with refused(*words):
        LlamaForCausalLM(tiny_config("llama", num_hidden_layers=32, tying=entry))


def test_nesting_beyond_what_json_reads_is_refused(tmp_path):
    tied_folder(tmp_path)
    text = (tmp_path / "config.json").read_text()
    deep = '{"a":' * 100_000 + "1" + "}" * 100_000
    (tmp_path / "config.json").write_text(text[: text.rindex("}")] + ', "tying": ' + deep + "}")
    with refused("config.json", "nested too deep", folder=tmp_path):
        tying_report(tmp_path)
    # transformers reads the file before anything of ours can: Python's own error, for any config so deep.
    with refused("recursion", folder=tmp_path, by=(TyingError, RecursionError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_entry_in_the_sub_config_of_a_composite_model_is_refused_too():
    config = tiny_config("llava")
    config.text_config.tying = {"version": 1, "scheme": "four_way"}
    with refused("'four_way'"):
        type(tiny_model("llava"))(config)


def test_a_wrong_entry_given_by_hand_is_refused_at_the_next_act(tmp_path):
    model = tie(untied_model("llama"), "two_way", init_from="target")
    model.config.tying = {"version": 1, "groups": {"softmax": HEAD}}
    for act in (
        lambda: assert_tied(model),
        lambda: model.save_pretrained(tmp_path),
        lambda: model.resize_token_embeddings(70),
    ):
        with refused("'softmax'", model=model, folder=tmp_path):
            act()


def test_a_mixin_config_refuses_what_its_file_says(tmp_path):
    class TiedConfig(TyingConfigMixin, LlamaConfig):
        pass

    TiedConfig(tying={"version": 1, "scheme": "two_way"}).save_pretrained(tmp_path)
    for case in ("a newer version", "a list", "a million names", "a deep list"):
        entry, *words = ENTRIES[case]
        set_entry(tmp_path, entry)
        with refused(*words, folder=tmp_path):
            TiedConfig.from_pretrained(tmp_path)
