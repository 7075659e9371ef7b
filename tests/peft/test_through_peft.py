"""What a PEFT user does with an adapter, with Tied-LoRA: PEFT's own verbs, transformers', Trainer's and TRL's."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.functional import inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_tying import TyingError, assert_tied, tie, tying_report
from hf_tying.peft import TiedLoraConfig

from ..tied_lora import QKV, dense_updates, layers_of, outputs, shake, tied_lora, tiny_classifier
from ..tiny import tiny_inputs, tiny_model

ROOT = Path(__file__).parents[2]
ARCHS = ["llama", "gpt2", "bert", "t5", "marian"]


@pytest.fixture
def model():
    return tied_lora(tiny_model("llama"))


def two_adapters():
    """`default`, TL6 on q, k and v; and `second`, TL5 of another rank on other modules."""
    model = tied_lora(tiny_model("llama"))
    model.add_adapter("second", TiedLoraConfig(r=2, variant="TL5", target_modules=["q_proj", "down_proj"]))
    return shake(model, 2, "second").eval()


def of_adapter(model, name):
    model.set_adapter(name)
    return outputs(model)


def one_of_each(model, adapter="default"):
    """Is every shared factor one parameter still?"""
    uses = [layer.uses[adapter] for layer in layers_of(model).values() if adapter in layer.uses]
    return all(
        len({id(getattr(use, kind).weight) for use in uses if getattr(use.names, kind) == name}) == 1
        for kind in "AB"
        for name in {getattr(use.names, kind) for use in uses}
    )


class TestSavingAndLoading:
    @pytest.mark.parametrize("arch", ARCHS)
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_loaded_adapter_is_the_saved_one_and_shares_what_it_shared(self, tmp_path, arch, low_cpu_mem_usage):
        model = tied_lora(tiny_model(arch), alpha=3)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(arch), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(outputs(loaded), outputs(model))
        assert one_of_each(loaded)

    def test_the_file_has_a_and_b_once_and_the_vectors_of_all_layers_as_rows(self, tmp_path):
        model = tied_lora(tiny_model("llama", num_hidden_layers=11))
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        start = "base_model.model.tied_matrices.tied_lora_"
        shapes = {name.removeprefix(start): tuple(value.shape) for name, value in saved.items()}
        assert shapes == {
            "A.self_attn-qkv-16": (4, 16),
            **{f"B.self_attn-{name}-16": (16, 4) for name in ("q_proj", "k_proj", "v_proj")},
            "u.self_attn-qkv-4": (11, 4),
            **{f"v.self_attn-{name}-16": (11, 16) for name in ("q_proj", "k_proj", "v_proj")},
        }
        # Row 10 is layer 10, not the one after layer 1.
        v = layers_of(model)["model.layers.10.self_attn.q_proj"].tied_lora_v["default"].weight
        assert torch.equal(saved[f"{start}v.self_attn-q_proj-16"][10], v)

    def test_a_fresh_process_gets_the_same_logits(self, tmp_path, model):
        model.save_pretrained(tmp_path)
        script = (
            "import sys, torch, hf_tying; from peft import PeftModel; from tests.adapters import outputs; "
            "from tests.models import tiny_model; "
            "torch.save(outputs(PeftModel.from_pretrained(tiny_model('llama'), sys.argv[1]).eval()), sys.argv[2])"
        )
        subprocess.run([sys.executable, "-c", script, tmp_path, tmp_path / "logits"], check=True, cwd=ROOT)
        assert torch.equal(torch.load(tmp_path / "logits"), outputs(model))

    def test_the_classifier_of_a_classification_task_is_saved_with_it(self, tmp_path):
        model = tied_lora(tiny_classifier("bert"), task_type="SEQ_CLS")
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
        inputs = {name: value for name, value in tiny_inputs(model.get_base_model()).items() if name != "labels"}
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_classifier("bert"), tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)

    @pytest.mark.parametrize("bias", ["all", "tied_lora_only"])
    def test_trained_biases_are_saved_with_it(self, tmp_path, bias):
        model = tied_lora(tiny_model("bert"), bias=bias)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("query.base_layer.bias"):
                    assert parameter.requires_grad
                    parameter.normal_()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model("bert"), tmp_path).eval()
        assert torch.equal(outputs(loaded), outputs(model))

    def test_an_adapter_named_like_a_module_or_a_factor_is_saved_and_loaded(self, tmp_path):
        model = tied_lora(tiny_model("llama"), adapter_name="q_proj")
        shake(model, 1, "q_proj")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "q_proj", adapter_name="self_attn").eval()
        assert torch.equal(outputs(loaded), outputs(model))

    def test_a_root_that_runs_its_children_in_a_row_gets_no_further_child(self, tmp_path):
        def sequence():
            torch.manual_seed(0)
            return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))

        model = tied_lora(sequence(), r=2, target_modules=["0", "2"], share_by="shape")
        x = torch.randn(3, 6)
        expected = model(x)
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(sequence(), tmp_path)(x), expected)
        assert torch.allclose(model.merge_and_unload()(x), expected, atol=1e-6)


class TestSeveralAdapters:
    def test_each_is_active_alone_and_both_add_up(self):
        model = two_adapters()
        first, second = of_adapter(model, "default"), of_adapter(model, "second")
        with model.disable_adapter():
            assert torch.equal(outputs(model), outputs(tiny_model("llama")))
        assert not torch.allclose(first, second, atol=1e-3)
        model.base_model.set_adapter(["default", "second"])
        both = outputs(model)
        assert torch.allclose(outputs(model.merge_and_unload()), both, atol=1e-5)

    def test_only_the_active_one_is_trained(self):
        model = two_adapters()
        for name, other in (("second", "default"), ("default", "second")):
            model.set_adapter(name)
            trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
            assert trained and all(f".{name}" in key and f".{other}." not in key for key in trained)
            assert model.get_model_status().active_adapters == [name]
            assert model.get_model_status().requires_grad == {name: True, other: False}

    def test_none_is_trained_while_they_are_off(self, model):
        with model.disable_adapter():
            assert not any(parameter.requires_grad for parameter in model.parameters())
        assert {name.partition("tied_lora_")[2][:1] for name, p in model.named_parameters() if p.requires_grad} == set(
            "ABuv"
        )

    def test_a_deleted_one_leaves_nothing(self):
        model = two_adapters()
        first = of_adapter(model, "default")
        model.delete_adapter("second")
        assert not [name for name, _ in model.named_modules() if "second" in name.split(".")]
        assert not [slot for slot in next(iter(layers_of(model).values()))._matrices[0].slots if slot[0] == "second"]
        assert torch.equal(outputs(model), first)

    def test_every_sample_of_a_batch_may_have_its_own(self):
        model = two_adapters()
        names = ["default", "second", "__base__", "second"]
        inputs = {name: value.repeat(2, 1) for name, value in tiny_inputs(model.get_base_model()).items()}
        with torch.no_grad():
            mixed = model(**inputs, adapter_names=names).logits
            for name in ("default", "second"):
                model.set_adapter(name)
                rows = [row for row, of_row in enumerate(names) if of_row == name]
                assert torch.allclose(mixed[rows], model(**inputs).logits[rows], atol=1e-6)
            with model.disable_adapter():
                assert torch.allclose(mixed[2], model(**inputs).logits[2], atol=1e-6)

    @pytest.mark.parametrize("arch", ["llama", "marian"])
    def test_a_beam_search_repeats_the_adapters_of_the_samples(self, arch):
        model = tied_lora(tiny_model(arch))
        model.add_adapter("second", TiedLoraConfig(r=2, target_modules=QKV[arch]))
        shake(model, 5, "second")
        inputs = {name: value for name, value in tiny_inputs(model.get_base_model()).items() if name != "labels"}
        search = dict(num_beams=3, max_new_tokens=4, min_new_tokens=4)
        mixed = model.generate(**inputs, adapter_names=["second", "default"], **search)
        for row, name in enumerate(["second", "default"]):
            model.set_adapter(name)
            assert torch.equal(model.generate(**inputs, **search)[row], mixed[row])

    def test_unknown_names_the_wrong_number_of_them_and_training_are_refused(self):
        model, inputs = two_adapters(), tiny_inputs(tiny_model("llama"))
        with pytest.raises(ValueError, match="non-existing adapter.*third"):
            model(**inputs, adapter_names=["third", "default"])
        with pytest.raises(ValueError, match="number of inputs, but got 3 and 2"):
            model(**inputs, adapter_names=["default"] * 3)
        with pytest.raises(ValueError, match="training mode"):
            model.train()(**inputs, adapter_names=["default"] * 2)


class TestMerging:
    @pytest.mark.parametrize("arch", ARCHS)
    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_a_merged_model_is_a_base_model_with_the_same_logits(self, arch, safe_merge):
        model = tied_lora(tiny_model(arch), alpha=6)
        expected = outputs(model)
        merged = model.merge_and_unload(safe_merge=safe_merge)
        assert torch.allclose(outputs(merged), expected, atol=1e-5)
        assert {name for name, _ in merged.named_parameters()} == {
            name for name, _ in tiny_model(arch).named_parameters()
        }
        assert not hasattr(merged, "peft_config")

    def test_unmerging_gives_the_base_weights_back(self, model):
        expected = outputs(model)
        weight = layers_of(model)["model.layers.0.self_attn.q_proj"].get_base_layer().weight
        before = weight.clone()
        model.merge_adapter()
        assert not torch.allclose(weight, before, atol=1e-3) and torch.allclose(outputs(model), expected, atol=1e-5)
        model.unmerge_adapter()
        assert torch.allclose(weight, before, atol=1e-6) and torch.allclose(outputs(model), expected, atol=1e-5)

    def test_a_safe_merge_of_a_broken_adapter_changes_nothing(self, model):
        layer = layers_of(model)["model.layers.0.self_attn.q_proj"]
        before = layer.get_base_layer().weight.clone()
        layer.tied_lora_v["default"].weight.data[3] = torch.inf
        with pytest.raises(ValueError, match="NaNs detected"):
            layer.merge(safe_merge=True)
        assert torch.equal(layer.get_base_layer().weight, before) and not layer.merged

    def test_an_embedding_is_merged_and_its_padding_row_stays(self):
        base = tiny_model("llama", tie_word_embeddings=False)
        pad = base.model.embed_tokens.weight[0].clone()
        config = TiedLoraConfig(r=4, target_modules=["embed_tokens", "lm_head"])
        model = get_peft_model(base, config)
        inputs = tiny_inputs(base)
        inputs["input_ids"][:, 0] = base.config.pad_token_id
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1)
        for _ in range(3):
            optimizer.zero_grad()
            model.train()(**inputs).loss.backward()
            optimizer.step()
        expected = outputs(model.eval())
        merged = model.merge_and_unload()
        assert torch.allclose(outputs(merged), expected, atol=1e-5)
        assert torch.equal(merged.model.embed_tokens.weight[0], pad)

    @pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
    @pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
    def test_over_a_tie_of_the_base_model_is_refused_and_changes_nothing(self, targets):
        model = tied_lora(tiny_model("llama", tie_word_embeddings=True), target_modules=targets)
        expected = outputs(model)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="Cannot merge.*untie first"):
                merge()
        assert torch.equal(outputs(model), expected)

    def test_beside_a_tie_of_the_base_model_keeps_the_tie(self):
        model = tied_lora(tie(tiny_model("llama", tie_word_embeddings=False), "two_way", init_from="target"))
        expected = outputs(model)
        merged = model.merge_and_unload()
        assert_tied(merged)
        assert torch.allclose(outputs(merged), expected, atol=1e-5)


class TestPrecision:
    @pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
    def test_the_factors_of_a_bfloat16_model_are_float32_unless_told(self, autocast, dtype):
        base = tiny_model("llama", dtype=torch.bfloat16)
        model = get_peft_model(base, TiedLoraConfig(r=4, target_modules=QKV["llama"]), autocast_adapter_dtype=autocast)
        factors = [parameter for name, parameter in model.named_parameters() if "tied_lora_" in name]
        assert {factor.dtype for factor in factors} == {dtype}
        assert one_of_each(model)
        model.train()(**tiny_inputs(base)).loss.backward()
        assert all(factor.grad is not None for factor in factors)

    def test_under_autocast_it_trains_as_in_float32_nearly(self, model):
        inputs = tiny_inputs(model.get_base_model())
        expected = model(**inputs).loss
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=0.02)


class TestTorch:
    def test_copies_and_pickles_share_what_the_original_shares_and_nothing_with_it(self, model):
        expected = outputs(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert one_of_each(twin)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.zero_()
            assert torch.equal(outputs(model), expected)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing_changes_no_gradient(self, use_reentrant):
        gradients = []
        for checkpointing in (False, True):
            model = tied_lora(tiny_model("llama"), dropout=0.0).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            model(**tiny_inputs(model.get_base_model())).loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])

    def test_it_compiles_into_one_graph(self, model):
        inputs = {name: value for name, value in tiny_inputs(model.get_base_model()).items() if name != "labels"}
        expected = outputs(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert torch.allclose(compiled(**inputs).logits, expected, atol=1e-6)

    def test_offloaded_layers_get_their_adapter_from_the_disk(self, tmp_path, monkeypatch, model):
        monkeypatch.chdir(tmp_path)  # PEFT writes what it offloads below the working directory
        tiny_model("llama").save_pretrained(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapter")
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
        offload = dict(offload_folder=str(tmp_path / "offload"))
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=places, **offload)
        places = {f"base_model.model.{name}": place for name, place in places.items()}
        places["base_model.model.tied_matrices"] = "cpu"
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", device_map=places, **offload).eval()
        assert layers_of(loaded)["model.layers.1.self_attn.q_proj"].tied_lora_v["default"].weight.is_meta
        assert torch.equal(outputs(loaded), outputs(model))
        assert torch.allclose(outputs(loaded.merge_and_unload()), outputs(model), atol=1e-5)


class TestTransformersOwnAdapters:
    def test_an_adapter_is_added_saved_loaded_switched_off_and_deleted(self, tmp_path):
        model = tiny_model("llama")
        model.add_adapter(TiedLoraConfig(r=4, target_modules=QKV["llama"]), "mine")
        shake(model, 1, "mine")
        expected = outputs(model)
        model.save_pretrained(tmp_path)
        loaded = tiny_model("llama")
        loaded.load_adapter(tmp_path, "other")
        assert torch.equal(outputs(loaded), expected) and one_of_each(loaded, "other")
        assert not any(parameter.requires_grad for parameter in loaded.parameters() if parameter.is_leaf)
        loaded.disable_adapters()
        assert torch.equal(outputs(loaded), outputs(tiny_model("llama")))
        loaded.enable_adapters()
        assert torch.equal(outputs(loaded), expected)
        loaded.delete_adapter("other")
        assert torch.equal(outputs(loaded), outputs(tiny_model("llama")))
        through_peft = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
        assert torch.equal(outputs(through_peft), expected)

    def test_from_pretrained_of_the_adapters_folder_gives_base_and_adapter(self, tmp_path, model):
        tiny_model("llama").save_pretrained(tmp_path / "base")
        for config in model.peft_config.values():
            config.base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapter")
        assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), outputs(model))

    def test_injection_into_a_plain_module_works(self, model):
        base = inject_adapter_in_model(TiedLoraConfig(r=4, target_modules=QKV["llama"]), tiny_model("llama"))
        shake(base)
        assert torch.equal(outputs(base), outputs(model))


def dataset():
    inputs = tiny_inputs(tiny_model("llama"))
    return Dataset.from_list([{name: value[row % 2].tolist() for name, value in inputs.items()} for row in range(16)])


class TestTrainers:
    def train(self, folder, steps, resume=None):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama"), TiedLoraConfig(r=4, target_modules=QKV["llama"], dropout=0.1))
        arguments = TrainingArguments(
            folder, max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
            report_to=[], disable_tqdm=True, lr_scheduler_type="constant", save_strategy="steps",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=dataset()).train(resume_from_checkpoint=resume)
        return model.eval()

    def test_a_resumed_training_is_the_uninterrupted_one(self, tmp_path):
        whole = self.train(tmp_path / "whole", 4)
        first = self.train(tmp_path / "parts", 2)
        resumed = self.train(tmp_path / "parts", 4, resume=tmp_path / "parts" / "checkpoint-2")
        assert torch.equal(outputs(resumed), outputs(whole))
        assert not torch.allclose(outputs(first), outputs(whole), atol=1e-3)

    def test_trl_trains_it(self, tmp_path):
        trl = pytest.importorskip("trl", reason="pip install hf-tying[trl]")
        from hf_tying.data import train_byte_level_bpe

        base = tiny_model("llama")
        ids = tiny_inputs(base)["input_ids"].tolist()
        trainer = trl.SFTTrainer(
            base,
            args=trl.SFTConfig(
                str(tmp_path),
                max_steps=2,
                use_cpu=True,
                bf16=False,
                report_to=[],
                disable_tqdm=True,
                learning_rate=0.1,
            ),
            train_dataset=Dataset.from_list([{"input_ids": ids[row % 2]} for row in range(8)]),
            processing_class=train_byte_level_bpe(["a few words"] * 5, 300),
            peft_config=TiedLoraConfig(r=4, target_modules=QKV["llama"]),
        )
        trainer.train()
        trainer.save_model(tmp_path / "last")
        loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "last").eval()
        assert torch.equal(outputs(loaded), outputs(trainer.model.eval()))
        assert not torch.equal(outputs(loaded), outputs(tiny_model("llama")))


class TestStatusAndConversion:
    def test_peft_converts_it_to_lora_by_its_own_way_too(self, model):
        from peft import convert_to_lora

        config, state = convert_to_lora(model, rank=4)
        assert isinstance(config, LoraConfig)
        for name, update in dense_updates(model).items():
            a, b = (state[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
            assert torch.allclose(b @ a, update, atol=1e-5)

    def test_the_config_says_which_factors_each_module_uses(self, tmp_path, model):
        model.save_pretrained(tmp_path)
        config = PeftConfig.from_pretrained(tmp_path)
        assert isinstance(config, TiedLoraConfig) and config.variant == "TL6" and config.scaling == 1
        names = config.adapted_modules["model.layers.1.self_attn.k_proj"]
        assert names["A"] == "self_attn-qkv-16" and names["B"] == "self_attn-k_proj-16"

    def test_the_base_models_state_dict_has_nothing_of_it(self, model):
        from peft import get_base_model_state_dict

        assert get_base_model_state_dict(model).keys() == tiny_model("llama").state_dict().keys()


class TestTheReport:
    def test_of_a_model_shows_each_shared_factor_with_its_modules(self):
        groups = {group.name: group for group in tying_report(two_adapters()).groups}
        a = groups["default: A self_attn-qkv-16"]
        assert len(a.names) == 6 and a.actual and a.shape == [4, 16] and a.parameters_saved == 5 * 4 * 16
        assert groups["second: B mlp-down_proj-16"].names == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
        assert groups["default: u model-layers-1-self_attn-qkv"].names == [
            f"model.layers.1.self_attn.{name}_proj" for name in "qkv"
        ]

    def test_of_a_model_whose_factor_is_not_one_any_more_says_so(self, model):
        layer = layers_of(model)["model.layers.1.self_attn.k_proj"]
        layer.uses["default"].B = copy.deepcopy(layer.uses["default"].B)
        groups = {group.name: group for group in tying_report(model).groups}
        assert not groups["default: B self_attn-k_proj-16"].actual
        assert groups["default: B self_attn-q_proj-16"].actual

    def test_of_a_folder_is_the_same(self, tmp_path, model):
        model.save_pretrained(tmp_path)
        live = {group.name.removeprefix("default: "): group for group in tying_report(model).groups}
        report = tying_report(tmp_path)
        assert report.architecture == "Tied-LoRA TL6" and report.parameters == 360
        for group in report.groups:
            assert sorted(group.names) == sorted(live[group.name].names) and group.in_file == group.names[:1]
            assert (
                group.shape == live[group.name].shape and group.parameters_saved == live[group.name].parameters_saved
            )
        assert len(report.groups) == len(live)

    def test_of_another_adapter_names_its_type(self, tmp_path):
        get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=QKV["llama"])).save_pretrained(tmp_path)
        with pytest.raises(TyingError, match="type 'LORA'.*Expected a model's folder, or that of a Tied-LoRA adapter"):
            tying_report(tmp_path)
