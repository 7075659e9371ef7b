"""What works with LoRA works with Tied-LoRA, or is refused before anything is changed. LoRA is the control."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    ElectraConfig,
    ElectraForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_tying import tie, untie
from hf_tying.peft import TiedLoraConfig, export_to_lora

from ..processes import run_python
from ..tied_lora import layers_of, outputs, shake, tied_lora
from ..tiny import tiny_model

both = pytest.mark.parametrize("config_class", [LoraConfig, TiedLoraConfig])


def adapted(model, config_class, **config):
    torch.manual_seed(0)
    model = get_peft_model(model, config_class(**({"r": 4, "target_modules": ["q_proj", "v_proj"]} | config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) / 2)
    return model.eval()


@both
@pytest.mark.parametrize("counts", [(4, 2), (2, 4)])
def test_one_config_serves_two_models(config_class, counts, tmp_path):
    config = config_class(r=4, target_modules=["q_proj", "v_proj"])
    first, second = (get_peft_model(tiny_model("llama", num_hidden_layers=n), config) for n in counts)
    if config_class is TiedLoraConfig:
        shake(first), shake(second, seed=2)
    for model, count in ((first, counts[0]), (second, counts[1])):
        model.save_pretrained(tmp_path / str(count))
        loaded = PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=count), tmp_path / str(count))
        assert torch.equal(outputs(loaded.eval()), outputs(model.eval()))


@pytest.mark.parametrize("variant", ["TL5", "TL6"])
@pytest.mark.parametrize("counts", [(2, 4), (4, 2)])
def test_a_file_for_another_number_of_modules_is_refused(variant, counts, tmp_path):
    tied_lora(tiny_model("llama", num_hidden_layers=counts[0]), variant=variant).save_pretrained(tmp_path)
    base = tiny_model("llama", num_hidden_layers=counts[1])
    with pytest.raises(RuntimeError, match=rf"saved for {3 * counts[0]} modules, and the model has {3 * counts[1]}"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not layers_of(base) and not hasattr(base, "peft_config")


@both
def test_a_file_of_another_rank_is_refused_and_changes_nothing(config_class, tmp_path):
    adapted(tiny_model("llama"), config_class).save_pretrained(tmp_path)
    model = adapted(tiny_model("llama"), config_class, r=8)
    before = outputs(model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(outputs(model), before)


@both
@pytest.mark.parametrize("name", ["tied_matrices", "tied_lora_A", "weight"])
def test_any_name_of_an_adapter_survives_its_file(config_class, name, tmp_path):
    model = get_peft_model(
        tiny_model("llama"), config_class(r=4, target_modules=["q_proj", "v_proj"]), adapter_name=name
    )
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
            parameter.copy_(torch.randn(parameter.shape) / 2)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / name, adapter_name=name)
    assert torch.equal(outputs(loaded.eval()), outputs(model))
    assert not torch.equal(outputs(model), outputs(tiny_model("llama")))


class NamedLikeMethods(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in ("keys", "items", "pop"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        return self.get_submodule("keys")(x) * self.get_submodule("items")(x) + self.get_submodule("pop")(x)


@both
def test_modules_may_have_the_names_of_methods(config_class, tmp_path):
    model = adapted(NamedLikeMethods(), config_class, target_modules=["keys", "items", "pop"])
    x = torch.randn(3, 8)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(NamedLikeMethods(), tmp_path).eval()(x), model(x))


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@both
@pytest.mark.parametrize(
    "make",
    [
        lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL)),
        lambda: ElectraForSequenceClassification(ElectraConfig(**SMALL, embedding_size=32)),
    ],
    ids=["roberta", "electra"],
)
def test_a_classifier_of_several_modules_is_merged(config_class, make):
    model = adapted(make(), config_class, target_modules=["query", "value"], task_type="SEQ_CLS")
    ids = torch.arange(3, 9)[None]
    expected = model(ids).logits
    merged = model.merge_and_unload()
    assert torch.allclose(merged(ids).logits, expected, atol=1e-5)
    assert isinstance(merged.classifier.dense, nn.Linear) and "modules_to_save" not in " ".join(merged.state_dict())


@both
def test_a_module_whose_weight_a_kernel_reads_is_refused(config_class):
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="out_proj' is incompatible with Mamba"):
        get_peft_model(model, config_class(r=4, target_modules=["x_proj", "out_proj"]))
    if config_class is TiedLoraConfig:  # LoRA has put adapters on what comes before
        assert list(model.state_dict()) == before


class TestTiedEmbeddings:
    @both
    @pytest.mark.parametrize("held", [False, True])
    def test_a_copy_that_is_trained_whole_can_be_one_for_both(self, config_class, held):
        model = tiny_model("llama", tie_word_embeddings=True)
        model = tie(model, "two_way") if held else model
        config = config_class(
            r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
        )
        model = get_peft_model(model, config)
        copies = [
            embeddings.modules_to_save["default"].weight
            for embeddings in (model.get_input_embeddings(), model.get_output_embeddings())
        ]
        assert copies[0] is copies[1] and copies[0].requires_grad

    def test_an_adapter_for_both_is_refused_before_anything_is_changed(self):
        model = tiny_model("llama", tie_word_embeddings=True)
        config = TiedLoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
        with pytest.raises(ValueError, match="no adapter for two tied embeddings.*modules_to_save"):
            get_peft_model(model, config)
        assert not layers_of(model) and not hasattr(model, "tied_matrices")

    @both
    @pytest.mark.parametrize("arch", ["bart", "t5", "marian"])
    def test_after_untie_an_adapter_on_one_side_is_merged(self, config_class, arch):
        base = untie(tiny_model(arch))
        model = adapted(base, config_class, target_modules=["encoder.embed_tokens"])
        expected = outputs(model)
        merged = model.merge_and_unload()
        assert torch.allclose(outputs(merged), expected, atol=1e-5)
        words = merged.get_encoder().get_input_embeddings().weight
        assert not torch.equal(words, tiny_model(arch).get_encoder().get_input_embeddings().weight)


@pytest.mark.parametrize("share_by", ["module", "all"])
def test_the_padding_row_has_no_update_in_any_form(share_by, tmp_path):
    targets = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
    model = tied_lora(BertModel(BertConfig(**SMALL)), target_modules=targets, share_by=share_by, r=2)
    words = next(layer for name, layer in layers_of(model).items() if name.endswith("word_embeddings"))
    assert not words.get_delta_weight("default")[0].any() and words.get_delta_weight("default")[1].any()
    ids = torch.tensor([[5, 6, 0, 0]])
    expected = model(ids).last_hidden_state
    model.save_pretrained(tmp_path / "tied")
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(merged(ids).last_hidden_state, expected, atol=1e-5)
    base = copy.deepcopy(model).unload()
    for source in (model, tmp_path / "tied"):
        folder = tmp_path / f"lora_{isinstance(source, PeftModel)}"
        export_to_lora(source, folder)
        lora = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        assert torch.allclose(lora(ids).last_hidden_state, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["A", "B", "u", "u_rows", "in_features"])
def test_settings_that_were_changed_in_the_file_are_refused_in_every_form(kind, tmp_path):
    tied_lora(tiny_model("llama"), target_modules=["q_proj", "k_proj"], tie_qkv=False).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    first, second = (config["adapted_modules"][f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1))
    first[kind] = 8 if kind == "in_features" else config["adapted_modules"]["model.layers.0.self_attn.k_proj"][kind]
    assert first != second
    path.write_text(json.dumps(config))
    base = tiny_model("llama")
    with pytest.raises(ValueError, match="not as they were saved.*model.layers.0.self_attn.q_proj"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not layers_of(base)
    with pytest.raises(ValueError, match="not as they were saved"):
        export_to_lora(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class TestNamesOfSettings:
    def test_the_names_that_pefts_methods_have_are_taken(self):
        config = TiedLoraConfig(r=4, tied_lora_alpha=8, tied_lora_dropout=0.1)
        assert config == TiedLoraConfig(r=4, alpha=8, dropout=0.1) and config.scaling == 2
        assert (config.tied_lora_alpha, config.tied_lora_dropout) == (8, 0.1)
        assert not {"tied_lora_alpha", "tied_lora_dropout"} & config.to_dict().keys()

    @pytest.mark.parametrize("name", ["alpha", "dropout"])
    def test_two_values_for_one_are_refused(self, name):
        with pytest.raises(ValueError, match=f"{name}=0.5 and tied_lora_{name}=0.25.*Give one"):
            TiedLoraConfig(**{name: 0.5, f"tied_lora_{name}": 0.25})

    @pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
    def test_patterns_of_lora_are_refused_by_name(self, name):
        with pytest.raises(ValueError, match=f"{name}=.*share their matrices.*another adapter"):
            TiedLoraConfig(**{name: {"q_proj": 2}})


#: Loads an adapter by transformers alone, in a process that has not imported PEFT.
FIRST_LOAD = """
import sys, torch, hf_tying
from transformers import AutoModelForCausalLM
assert "peft" not in sys.modules
for _ in range(2):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    print((model(torch.arange(8)[None]).logits - torch.load(sys.argv[2])).abs().max().item() < 1e-6)
"""


def test_the_first_adapter_that_transformers_loads_is_there(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = type(tiny_model("llama")).from_pretrained(tmp_path / "base")
    model = tied_lora(base)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None]).logits
        assert not torch.allclose(logits, model.unload()(torch.arange(8)[None]).logits, atol=1e-3)
    torch.save(logits, tmp_path / "logits.pt")
    done = run_python("-c", FIRST_LOAD, tmp_path / "adapter", tmp_path / "logits.pt")
    assert done.stdout.split() == ["True", "True"]
