"""What else a user of PEFT does with an adapter: precision, torch's own tools, trainers, status and conversion."""

import copy
import dataclasses
import pickle

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_tying.peft import TiedLoraConfig
from hf_tying.peft.matrices import LayerFactors

from ..tied_lora import QKV, dense_updates, layers_of, outputs, shares_its_factors, tied_lora
from ..tiny import tiny_inputs, tiny_model


class TestPrecision:
    @pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
    def test_the_factors_of_a_bfloat16_model_are_float32_unless_told(self, autocast, dtype):
        base = tiny_model("llama", dtype=torch.bfloat16)
        model = get_peft_model(base, TiedLoraConfig(r=4, target_modules=QKV["llama"]), autocast_adapter_dtype=autocast)
        factors = [parameter for name, parameter in model.named_parameters() if "tied_lora_" in name]
        assert {factor.dtype for factor in factors} == {dtype}
        assert shares_its_factors(model)
        model.train()(**tiny_inputs(base)).loss.backward()
        assert all(factor.grad is not None for factor in factors)

    def test_under_autocast_the_loss_is_nearly_that_of_float32(self, model):
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
            assert shares_its_factors(twin)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.zero_()
            assert torch.equal(outputs(model), expected)

    def test_a_whole_model_that_0_1_pickled_computes_the_same(self, model):
        text = pickle.dumps(model, protocol=0)  # which spells module and name of a class line by line
        for new, old in {
            ("matrices", "LayerFactors"): ("layer", "Use"),
            ("sharing", "FactorNames"): ("sharing", "Sharing"),
            ("plan", "PlannedModule"): ("plan", "Adapted"),
        }.items():
            new, old = (f"chf_tying.peft.{module}\n{name}\n".encode() for module, name in (new, old))
            assert new in text
            text = text.replace(new, old)
        assert torch.equal(outputs(pickle.loads(text)), outputs(model))

    def test_the_factors_of_a_layer_that_0_1_pickled_are_found(self, model):
        for layer in layers_of(model).values():
            of_0_1 = dict(vars(layer.uses["default"]))
            of_0_1 |= {kind: layer.uses["default"].factor(kind) for kind in "ABu"}
            del of_0_1["places"]
            old = LayerFactors.__new__(LayerFactors)
            old.__setstate__(of_0_1)
            assert all(old.factor(kind) is layer.uses["default"].factor(kind) is not None for kind in "ABu")
            assert old.A is old.factor("A") and vars(old).keys() == vars(layer.uses["default"]).keys()

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

    def test_an_adapted_model_compiles_into_one_graph(self, model):
        inputs = {name: value for name, value in tiny_inputs(model.get_base_model()).items() if name != "labels"}
        expected = outputs(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert torch.allclose(compiled(**inputs).logits, expected, atol=1e-6)


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

    def test_trl_trains_an_adapter(self, tmp_path):
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
    def states(self, config):
        """What PEFT says of a model with two adapters: at first, and after each change."""
        model = get_peft_model(tiny_model("llama"), config)
        model.add_adapter("second", config)
        yield model.get_model_status(), model.get_layer_status()
        for change in (
            lambda: model.set_adapter("second"),
            model.merge_adapter,
            model.unmerge_adapter,
            model.base_model.disable_adapter_layers,
            model.base_model.enable_adapter_layers,
            lambda: model.set_requires_grad("default", True),
            lambda: model.delete_adapter("default"),
        ):
            change()
            yield peft.get_model_status(model.base_model.model), peft.get_layer_status(model)

    @pytest.mark.parametrize(
        "settings",
        [{}, {"variant": "TL5"}, {"train_A": False, "train_B": False}, {f"train_{kind}": False for kind in "ABu"}],
        ids=str,
    )
    def test_the_status_is_that_of_lora(self, settings):
        lora = self.states(LoraConfig(target_modules=QKV["llama"]))
        ours = self.states(TiedLoraConfig(r=4, target_modules=QKV["llama"], **settings))
        for (of_model, of_layers), (model, layers) in zip(lora, ours, strict=True):
            of_models = [dataclasses.asdict(one) for one in (of_model, model)]
            for one in of_models:
                for key in ("adapter_model_type", "peft_types", "trainable_params", "total_params"):
                    del one[key]
            assert of_models[0] == of_models[1]
            renamed = [dataclasses.replace(row, module_type="tied_" + row.module_type) for row in of_layers]
            assert renamed == layers

    def test_a_layer_whose_factors_are_trained_in_part_is_irregular_as_in_lora(self):
        for config, factor in (
            (LoraConfig(target_modules=["q_proj"]), "lora_A"),
            (TiedLoraConfig(r=4, target_modules=["q_proj"]), "tied_lora_A"),
        ):
            model = get_peft_model(tiny_model("llama"), config)
            for name, parameter in model.named_parameters():
                if factor in name:
                    parameter.requires_grad_(False)
            rows = model.get_layer_status()
            assert rows and all(row.requires_grad == {"default": "irregular"} for row in rows)

    def test_peft_converts_an_adapter_to_lora_in_its_own_way_too(self, model):
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

    def test_the_state_dict_of_the_base_model_has_nothing_of_the_adapter(self, model):
        from peft import get_base_model_state_dict

        assert get_base_model_state_dict(model).keys() == tiny_model("llama").state_dict().keys()
