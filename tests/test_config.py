"""Where a tie is declared: `TyingConfig`, `TyingConfigMixin`, and an import that costs and changes little."""

import json

import pytest
from transformers import AutoConfig, BertConfig, EncoderDecoderConfig, GPT2Config, LlamaConfig, T5Config

import hf_tying
from hf_tying import TyingConfig, TyingConfigMixin, TyingError
from hf_tying.config import SCHEMES

from .processes import run_python

PAIR = ["model.embed_tokens.weight", "lm_head.weight"]
ENTRY = {"version": 1, "scheme": "two_way"}


class TiedLlamaConfig(TyingConfigMixin, LlamaConfig):
    model_type = "tied_llama"


class TiedGPT2Config(TyingConfigMixin, GPT2Config):
    model_type = "tied_gpt2"


class TiedT5Config(TyingConfigMixin, T5Config):
    model_type = "tied_t5"


class TiedPairConfig(TyingConfigMixin, EncoderDecoderConfig):
    model_type = "tied_pair"


MIXED = [TiedLlamaConfig, TiedGPT2Config, TiedT5Config]


class TestTyingConfig:
    def test_nothing_is_tied_unless_something_is_declared(self):
        config = TyingConfig()
        assert (config.scheme, config.groups, config.on_conflict, config.save_format) == (None, {}, "error", None)
        assert TyingConfig.from_dict(None) == config

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_every_scheme_has_a_name_that_reads_back(self, scheme):
        assert TyingConfig.from_dict(TyingConfig(scheme=scheme).to_dict()).scheme == scheme

    def test_the_entry_is_a_plain_dict_that_json_gives_back_unchanged(self):
        config = TyingConfig("three_way", {"layers": ["a.weight", "b.weight"]}, "use:a.weight", "portable")
        entry = config.to_dict()
        assert entry == {
            "version": 1,
            "scheme": "three_way",
            "groups": {"layers": ["a.weight", "b.weight"]},
            "on_conflict": "use:a.weight",
            "save_format": "portable",
        }
        assert TyingConfig.from_dict(json.loads(json.dumps(entry))) == config

    def test_an_entry_may_leave_out_whatever_has_a_default(self):
        assert TyingConfig.from_dict({}) == TyingConfig()
        assert TyingConfig.from_dict({"scheme": "two_way"}) == TyingConfig("two_way")
        nulls = {"scheme": None, "groups": None, "on_conflict": None, "save_format": None}
        assert TyingConfig.from_dict(nulls) == TyingConfig()

    def test_what_tie_accepts_is_read_in_one_place(self):
        assert TyingConfig.of("two_way") == TyingConfig(scheme="two_way")
        assert TyingConfig.of({"head": PAIR}) == TyingConfig(groups={"head": PAIR})
        assert TyingConfig.of(TyingConfig("none")) == TyingConfig("none")
        assert TyingConfig.of({"version": 1, "scheme": "two_way"}) == TyingConfig("two_way")
        for names in (PAIR, tuple(PAIR)):
            (group,) = TyingConfig.of(names).groups.values()
            assert group == PAIR

    def test_a_bare_list_is_named_after_what_its_names_end_in(self):
        names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
        (group,) = TyingConfig.of(names).groups
        assert group.endswith("mlp.up_proj.weight") and group not in names
        assert list(TyingConfig.of(["a.x", "b.y"]).groups) == ["a.x"]

    def test_a_declaration_cannot_be_changed_behind_its_back(self):
        names = list(PAIR)
        config = TyingConfig(groups={"head": names})
        names.append("third.weight")
        config.to_dict()["groups"]["head"].append("third.weight")
        assert config.groups == {"head": PAIR}
        with pytest.raises(AttributeError):
            config.scheme = "none"
        assert config.replace(scheme="none").scheme == "none" and config.scheme is None

    def test_a_changed_copy_is_checked_like_a_new_one(self):
        with pytest.raises(TyingError, match="three_ways"):
            TyingConfig().replace(scheme="three_ways")

    def test_the_error_is_a_value_error_so_that_existing_handlers_see_it(self):
        assert issubclass(TyingError, ValueError)


class TestTyingConfigMixin:
    @pytest.mark.parametrize("cls", MIXED)
    def test_the_keyword_is_kept_as_the_plain_dict_of_the_file(self, cls):
        config = cls(tying=ENTRY)
        assert type(config.tying) is dict
        assert config.tying == TyingConfig("two_way").to_dict()
        assert config.tying_config == TyingConfig("two_way")

    @pytest.mark.parametrize("cls", MIXED)
    def test_without_the_keyword_nothing_is_declared(self, cls):
        assert cls().tying is None and cls().tying_config == TyingConfig()

    @pytest.mark.parametrize("cls", MIXED)
    def test_the_entry_survives_the_file(self, cls, tmp_path):
        config = cls(tying={"version": 1, "groups": {"layers": ["a.weight", "b.weight"]}}, bos_token_id=7)
        config.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["tying"] == config.tying
        loaded = cls.from_pretrained(tmp_path)
        assert loaded.tying == config.tying and loaded.bos_token_id == 7

    @pytest.mark.parametrize("cls", MIXED)
    def test_a_wrong_entry_is_refused_when_the_config_is_made(self, cls, tmp_path):
        with pytest.raises(TyingError, match="two_weigh.*two_way"):
            cls(tying={"version": 1, "scheme": "two_weigh"})
        cls(tying=ENTRY).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(written | {"tying": ["two_way"]}))
        with pytest.raises(TyingError, match="list"):
            cls.from_pretrained(tmp_path)

    def test_two_configs_share_no_entry(self):
        entry = {"version": 1, "groups": {"layers": ["a.weight", "b.weight"]}}
        first, second = TiedLlamaConfig(tying=entry), TiedLlamaConfig(tying=entry)
        first.tying["groups"]["layers"].append("c.weight")
        assert second.tying["groups"] == entry["groups"] == {"layers": ["a.weight", "b.weight"]}
        assert TiedLlamaConfig().tying is None

    def test_the_keyword_may_be_a_tying_config(self):
        assert TiedLlamaConfig(tying=TyingConfig("two_way")).tying == TyingConfig("two_way").to_dict()

    def test_from_pretrained_takes_another_entry(self, tmp_path):
        TiedLlamaConfig(tying=ENTRY).save_pretrained(tmp_path)
        assert (
            TiedLlamaConfig.from_pretrained(tmp_path, tying={"version": 1, "scheme": "none"}).tying["scheme"] == "none"
        )

    def test_a_composite_config_takes_the_keyword_beside_its_parts(self, tmp_path):
        entry = {"version": 1, "scheme": "three_way"}
        config = TiedPairConfig.from_encoder_decoder_configs(BertConfig(), BertConfig(), tying=entry)
        assert config.tying == TyingConfig("three_way").to_dict()
        assert getattr(config.encoder, "tying", None) is None and getattr(config.decoder, "tying", None) is None
        config.save_pretrained(tmp_path)
        assert TiedPairConfig.from_pretrained(tmp_path).tying == config.tying

    def test_a_stock_config_carries_the_entry_as_it_is(self, tmp_path):
        config = LlamaConfig(tying=ENTRY)
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).tying == ENTRY


def fresh(program: str) -> str:
    """What `program` prints in a new process that can import the package and the tests."""
    return run_python("-c", program).stdout.strip()


TWO_MODELS = """
import sys
fields = dict(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    tie_word_embeddings=True)
plain = LlamaForCausalLM(LlamaConfig(**fields))
touched = "_tied_weights_keys" in vars(plain) or hasattr(plain.config, "tying")
touched = touched or "hf_tying.ties.modeling" in sys.modules
print("changed" if touched or type(plain) is not LlamaForCausalLM else "left alone")
model = LlamaForCausalLM(LlamaConfig(**fields, tying={"version": 1, "scheme": "two_way"}))
print(type(model).__name__, model.lm_head.weight is model.model.embed_tokens.weight, len(model.tie_groups))
"""


class TestImport:
    def test_it_loads_no_torch_and_no_model_code(self):
        program = "import sys, hf_tying; print(sorted(sys.modules))"
        loaded = fresh(program)
        for module in (
            "torch",
            "peft",
            "accelerate",
            "transformers.modeling_utils",
            "datasets",
            "hf_tying.ties.modeling",
        ):
            assert f"'{module}'" not in loaded
        assert "'hf_tying.config'" in loaded

    def test_it_costs_less_than_a_tenth_of_the_import_of_transformers(self):
        # Processor time: on a busy machine the clock on the wall measures the neighbours.
        program = (
            "from time import process_time as now; a = now(); import transformers; b = now(); import hf_tying; "
            "c = now(); import sys; assert 'transformers.modeling_utils' not in sys.modules; print((c - b) / (b - a))"
        )
        assert float(fresh(program)) < 0.1

    def test_a_declaration_can_be_checked_without_torch(self):
        program = """
import sys
from hf_tying import TyingConfig, TyingConfigMixin, TyingError
try:
    TyingConfig("two_weigh")
except TyingError as error:
    print(TyingConfig("two_way").to_dict()["scheme"], "torch" in sys.modules, error)
"""
        assert fresh(program).startswith("two_way False Unknown tying scheme 'two_weigh'")

    def test_every_public_name_is_there_and_listed(self):
        for name in hf_tying.__all__:
            assert getattr(hf_tying, name).__doc__
            assert name in dir(hf_tying)
        assert {"TyingConfig", "TyingConfigMixin", "TiedModelMixin", "TyingError", "tie", "untie", "assert_tied",
                "tying_report", "TyingCallback"} <= set(hf_tying.__all__)  # fmt: skip

    def test_an_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="no attribute 'tye'"):
            hf_tying.tye  # noqa: B018
        with pytest.raises(ImportError):
            from hf_tying import tye  # noqa: F401

    @pytest.mark.parametrize(
        "imports",
        [
            "import hf_tying, peft\nfrom transformers import LlamaConfig, LlamaForCausalLM",
            "import peft, accelerate\nfrom transformers import LlamaConfig, LlamaForCausalLM\nimport hf_tying",
        ],
        ids=["package first", "package last"],
    )
    def test_in_any_order_of_imports_entries_are_honoured_and_models_without_one_left_alone(self, imports):
        assert fresh(imports + TWO_MODELS).splitlines() == ["left alone", "LlamaForCausalLM True 1"]
