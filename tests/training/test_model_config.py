"""`--config_overrides` go into the constructor, so that nothing that a config has computed is left behind."""

import json
import logging
from functools import partial

import pytest
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GPT2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_tying import TyingError
from hf_tying.training.model_config import config_with_overrides, maker_from, parse_overrides, type_config

# Fields by which others are computed somewhere: widths of heads, kinds of layers, key-value heads, a decoder's layers.
CHANGES = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3", "smollm3", "falcon"),
    *("gpt2", "gpt_neox", "opt", "bloom", "mamba", "mixtral", "cohere2", "t5", "mt5", "umt5", "bart", "marian"),
)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("name", CHANGES)
def test_every_field_is_what_the_constructor_computes(model_type, name):
    default = AutoConfig.for_model(model_type)
    if not hasattr(default, name):
        pytest.skip(f"{model_type} has no {name}")
    own = default.attribute_map.get(name, name)  # T5 computes its decoder's layers of num_layers
    expected = AutoConfig.for_model(model_type, **{own: CHANGES[name]})
    found = config_with_overrides(partial(AutoConfig.for_model, model_type), f"{name}={CHANGES[name]}")
    assert getattr(found, name) == CHANGES[name]
    assert found.to_dict() == expected.to_dict()


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "t5"])
def test_a_config_from_a_file_computes_again_what_it_had_computed(model_type, tmp_path):
    AutoConfig.for_model(model_type, num_hidden_layers=4, vocab_size=77).save_pretrained(tmp_path)
    make = maker_from(AutoConfig.from_pretrained(tmp_path))
    assert make().to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    found = config_with_overrides(make, "num_hidden_layers=2")
    assert found.vocab_size == 77 and found.num_hidden_layers == 2
    assert len(getattr(found, "layer_types", None) or "ab") == 2
    assert getattr(found, "num_decoder_layers", 2) in (2, 6)


def test_a_width_from_a_file_follows_the_size(tmp_path):
    AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=4).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["head_dim"] == 16
    make = maker_from(AutoConfig.from_pretrained(tmp_path))
    assert config_with_overrides(make, "hidden_size=128").head_dim == 32


def test_values_are_json_or_as_the_default_is():
    text = 'a=1, b=[1, "x,y"],c={"d": 2},e="q,r",f=true,g=1e-3'
    assert parse_overrides(text) == {"a": "1", "b": [1, "x,y"], "c": {"d": 2}, "e": "q,r", "f": "true", "g": "1e-3"}
    overrides = 'num_hidden_layers=2,layer_types=["full_attention","full_attention"],attention_bias=yes,rms_norm_eps=1'
    found = config_with_overrides(partial(AutoConfig.for_model, "qwen3"), overrides + ",head_dim=8,pad_token_id=null")
    assert found.layer_types == ["full_attention"] * 2 and found.attention_bias is True and found.head_dim == 8
    assert found.rms_norm_eps == 1.0 and found.pad_token_id is None


@pytest.mark.parametrize(
    "model_type, overrides, message",
    [
        ("llama", "hiden_size=4", "'hiden_size' is not in .*'hidden_size'"),
        ("llama", "hidden_size", "not of the form name=value"),
        ("llama", "hidden_size=a", "expected int"),
        ("llama", "hidden_size=4,hidden_size=5", "hidden_size is given twice"),
        ("t5", "num_layers=4,num_hidden_layers=5", "name one field twice"),
        ("llama", "attention_bias=maybe", "expected true or false"),
        ("qwen3", 'num_hidden_layers=2,layer_types=["full_attention"]', "layer_types"),
        ("qwen3", "layer_types=[1", "not JSON"),
        ("qwen3", 'layer_types=["a"]b=1', "expected a comma"),
        ("llama", "validate=1", "'validate' is not in"),
    ],
)
def test_wrong_overrides_are_refused_in_one_line(model_type, overrides, message):
    with pytest.raises(TyingError, match=message) as error:
        config_with_overrides(partial(AutoConfig.for_model, model_type), overrides)
    assert "\n" not in str(error.value)


def test_a_registered_type_is_known_and_another_is_not():
    make = partial(type_config, models=MODEL_FOR_CAUSAL_LM_MAPPING, types=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert make("tied_lstm").model_type == "tied_lstm"
    for unknown in ("tied_lstn", "t5"):
        with pytest.raises(TyingError, match=f"{unknown}: transformers has no model of this type for the task"):
            make(unknown)


def test_making_a_config_again_warns_of_nothing_and_leaves_the_loaded_one(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    AutoConfig.for_model("llama", vocab_size=50_000, eos_token_id=40_000).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    before = json.dumps(loaded.to_dict(), default=str)
    AutoConfig.for_model("llama", eos_token_id=45_000)
    assert "within the vocabulary" in caplog.text  # what is said of a config that lacks its own vocab_size
    caplog.clear()
    maker_from(loaded)().rope_parameters["rope_theta"] = 3.0
    assert not caplog.records and json.dumps(loaded.to_dict(), default=str) == before


def test_a_config_that_is_not_made_again_is_refused():
    class Doubling(GPT2Config):
        model_type = "doubling"

        def __init__(self, n_embd=8, **kwargs):
            super().__init__(n_embd=2 * n_embd, **kwargs)

    with pytest.raises(TyingError, match="'doubling' cannot be made again"):
        maker_from(Doubling())
