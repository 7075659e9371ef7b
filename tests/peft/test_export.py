"""`export_to_lora`: the same function as an ordinary LoRA adapter, for PEFT without this package."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from hf_tying.peft import TiedLoraConfig, export_to_lora

from ..native_adapters import needs_native_adapters
from ..processes import run_python
from ..tied_lora import dense_updates, outputs, shake, tied_lora, tiny_classifier
from ..tiny import tiny_model

ARCHS = ["llama", "gpt2", "bert", "t5", "marian"]
GQA = {"llama": {"num_key_value_heads": 1}}


def base_of(arch):
    # T5 does not scale its attention scores, and makes of a rounding in float32 a difference of 1e-4.
    return tiny_model(arch, dtype=torch.float64 if arch == "t5" else torch.float32, **GQA.get(arch, {}))


def loaded(arch, folder):
    """The base model with the adapter in `folder`, as PEFT loads it."""
    return PeftModel.from_pretrained(base_of(arch), folder).eval()


def lora_updates(folder):
    """lora_B lora_A of each module in a file, `(out, in)`, with scaling 1."""
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    updates = {}
    for name, a in tensors.items():
        if ".lora_A." in name or name.endswith(".lora_embedding_A"):
            b = tensors[name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")]
            updates[name.removeprefix("base_model.model.").partition(".lora_")[0]] = b @ a
    return updates


def equal_updates(first, second, tolerance=1e-6):
    assert first.keys() == second.keys()
    return all(torch.allclose(first[name], second[name], rtol=tolerance, atol=tolerance) for name in first)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("variant", ["TL5", "TL6"])
def test_peft_has_the_same_logits_with_the_exported_adapter(arch, variant, tmp_path):
    model = tied_lora(base_of(arch), variant=variant, alpha=6)
    export_to_lora(model, tmp_path / "lora")
    lora = loaded(arch, tmp_path / "lora")
    assert type(lora.peft_config["default"]) is LoraConfig
    assert torch.allclose(outputs(lora), outputs(model), atol=1e-6)
    assert not torch.allclose(outputs(lora), outputs(base_of(arch)), atol=1e-3)


@st.composite
def switches(draw):
    values = {name: draw(st.booleans()) for name in ("tie_A", "tie_B", "tie_qkv", "train_A", "train_u", "train_v")}
    return values | {"share_by": draw(st.sampled_from(["module", "shape", "all"]))}


@settings(max_examples=20, deadline=None)
@given(
    config=switches(),
    targets=st.sampled_from([["q_proj", "v_proj"], "all-linear", ["embed_tokens", "k_proj", "down_proj"]]),
    arch=st.just("llama"),
)
def test_from_a_model_and_from_its_file_every_update_is_that_of_the_formula(config, targets, arch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    model = tied_lora(base_of(arch), r=3, alpha=4.5, target_modules=targets, **config)
    model.save_pretrained(folder / "tied")
    expected = dense_updates(model)
    for name, source in {"of_model": model, "of_path": folder / "tied"}.items():
        export_to_lora(source, folder / name)
        assert equal_updates(lora_updates(folder / name), expected)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])  # without one, a file names the class of its model
def test_both_ways_write_the_same_bytes_and_leave_nothing_else(task_type, tmp_path):
    model = tied_lora(base_of("gpt2"), task_type=task_type, fan_in_fan_out=True)
    model.save_pretrained(tmp_path / "tied")
    export_to_lora(model, tmp_path / "of_model")
    export_to_lora(str(tmp_path), tmp_path / "of_path", subfolder="tied")
    names = sorted(os.listdir(tmp_path / "of_model"))
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["of_model", "of_path", "tied"]
    for name in names:
        assert (tmp_path / "of_model" / name).read_bytes() == (tmp_path / "of_path" / name).read_bytes()


def test_the_settings_say_what_lora_needs(tmp_path):
    base = tiny_classifier("bert")
    base.name_or_path = "some/base"
    model = tied_lora(base, task_type="SEQ_CLS", bias="tied_lora_only", dropout=0.1, revision="v1")
    export_to_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "bias": "lora_only",
        "modules_to_save": ["classifier", "score"],  # PEFT's own, for every classifier
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "some/base",
        "revision": "v1",
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
    assert {name: config[name] for name in expected} == expected
    targets = config["target_modules"]
    assert targets == sorted(targets) and len(targets) == 6
    assert targets[0] == "bert.encoder.layer.0.attention.self.key"


def test_modules_to_save_and_biases_go_with_it(tmp_path):
    model = tied_lora(tiny_classifier("bert"), task_type="SEQ_CLS", bias="all", modules_to_save=["classifier"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    export_to_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(tiny_classifier("bert"), tmp_path).eval()
    ids = torch.arange(3, 15).view(2, 6)
    assert torch.allclose(lora(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6)
    assert not torch.allclose(lora(input_ids=ids).logits, tiny_classifier("bert")(input_ids=ids).logits, atol=1e-3)


@needs_native_adapters
def test_an_adapter_that_transformers_put_in_itself_is_exported(tmp_path):
    model = base_of("llama")
    model.add_adapter(TiedLoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "mine")
    shake(model, adapter_name="mine").eval()
    model.save_pretrained(tmp_path / "tied")
    export_to_lora(model, tmp_path / "lora", adapter_name="mine")
    assert torch.allclose(outputs(loaded("llama", tmp_path / "lora")), outputs(model), atol=1e-6)
    export_to_lora(tmp_path / "tied", tmp_path / "of_path")
    assert equal_updates(lora_updates(tmp_path / "lora"), lora_updates(tmp_path / "of_path"))
    native = base_of("llama")
    native.load_adapter(str(tmp_path / "lora"))
    assert torch.allclose(outputs(native.eval()), outputs(model), atol=1e-6)


def test_one_of_several_adapters_is_exported_alone(tmp_path):
    model = tied_lora(base_of("llama"))
    model.add_adapter("second", TiedLoraConfig(r=2, target_modules=["o_proj"]))
    shake(model, 2, "second")
    export_to_lora(model, tmp_path / "second", "second")
    model.set_adapter("second")
    assert torch.allclose(outputs(loaded("llama", tmp_path / "second")), outputs(model), atol=1e-6)


class Words(nn.Module):
    """An embedding with a padding row, and a Conv1D beside a Linear."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.words = nn.Embedding(20, 6, padding_idx=0)
        self.mix = Conv1D(10, 6)
        self.out = nn.Linear(10, 5)

    def forward(self, ids):
        return self.out(torch.tanh(self.mix(self.words(ids))))


@pytest.mark.parametrize("share_by", ["module", "all"])
def test_embeddings_conv1d_and_linear_in_one_model_are_exported(share_by, tmp_path):
    ids = torch.arange(12).view(2, 6)
    model = tied_lora(Words(), target_modules=["words", "mix", "out"], share_by=share_by)
    export_to_lora(model, tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {"base_model.model.words.lora_embedding_A", "base_model.model.words.lora_embedding_B"} < names
    lora = PeftModel.from_pretrained(Words(), tmp_path).eval()
    assert torch.allclose(lora(ids), model(ids), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype, tmp_path):
    model = tied_lora(base_of("llama")).to(dtype)
    export_to_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert all(tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize("kind", ["u", "v", "B"])
def test_a_factor_of_zeros_is_exported_as_it_is(kind, tmp_path):
    model = tied_lora(base_of("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"tied_lora_{kind}" in name:
                parameter.zero_()
    export_to_lora(model, tmp_path)
    assert equal_updates(lora_updates(tmp_path), dense_updates(model))
    assert torch.allclose(outputs(loaded("llama", tmp_path)), outputs(base_of("llama")), atol=1e-6)


def test_a_process_without_this_package_loads_it(tmp_path):
    for arch in ARCHS:
        base_of(arch).save_pretrained(tmp_path / arch / "base")
        model = tied_lora(base_of(arch), alpha=6)
        if arch == "llama":
            model.save_pretrained(tmp_path / arch / "lora", also_lora=True)
        else:
            export_to_lora(model, tmp_path / arch / "lora")
        torch.save(outputs(model), tmp_path / arch / "logits.pt")
    code = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
AUTO = dict(llama=AutoModelForCausalLM, gpt2=AutoModelForCausalLM, bert=AutoModelForMaskedLM,
            t5=AutoModelForSeq2SeqLM, marian=AutoModelForSeq2SeqLM)
ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
for folder in Path(sys.argv[1]).iterdir():
    base = AUTO[folder.name].from_pretrained(folder / "base", dtype="auto")
    model = PeftModel.from_pretrained(base, folder / "lora").eval()
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).logits
    expected = torch.load(folder / "logits.pt")
    assert torch.allclose(found, expected, atol=1e-6), (folder.name, (found - expected).abs().max())
assert "hf_tying" not in sys.modules
"""
    run_python("-W", "ignore", "-c", code, tmp_path)


def test_an_error_while_writing_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    model = tied_lora(base_of("llama"))
    export_to_lora(model, tmp_path / "lora")
    (tmp_path / "lora" / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(LoraConfig, "save_pretrained", fails)
    shake(model, 2)
    for out in ("lora", "new"):
        with pytest.raises(OSError, match="disk full"):
            export_to_lora(model, tmp_path / out)
    assert os.listdir(tmp_path) == ["lora"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()} == before
    monkeypatch.undo()
    export_to_lora(model, tmp_path / "lora")
    assert equal_updates(lora_updates(tmp_path / "lora"), dense_updates(model))
    assert (tmp_path / "lora" / "notes.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "lora")


def test_the_settings_are_replaced_last(tmp_path, monkeypatch):
    """Who reads the folder meanwhile finds the old settings."""
    export_to_lora(tied_lora(base_of("llama")), tmp_path)
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, place: (moved.append(Path(place).name), replace(source, place)))
    export_to_lora(tied_lora(base_of("llama"), seed=2), tmp_path)
    assert moved == ["adapter_model.safetensors", "adapter_config.json"]


class TestTheCommand:
    def test_the_command_writes_the_export_and_says_what_it_is(self, hf_tying, tmp_path):
        model = tied_lora(base_of("llama"))
        model.save_pretrained(tmp_path / "run" / "tied")
        lora = tmp_path / "lora"
        status, output, _ = hf_tying("export", tmp_path / "run", lora, "--subfolder", "tied", "--json")
        assert status == 0
        assert equal_updates(lora_updates(lora), dense_updates(model))
        assert json.loads(output) == {
            "schema": 1,
            "command": "export",
            "source": str(tmp_path / "run"),
            "findings": [],
            "format": "lora",
            "folder": str(lora),
            "base_model": None,
            "r": 4,
            "modules": 6,
            # q, and k and v that are half as wide, in two layers.
            "parameters": 2 * 4 * (3 * 16 + 16 + 2 * 8),
            "bytes": (lora / "adapter_model.safetensors").stat().st_size,
        }
        status, output, _ = hf_tying("export", tmp_path / "run" / "tied", lora, "--format", "lora")
        assert status == 0
        assert [line.split()[0] for line in output.splitlines()][:2] == ["format", "folder"]

    def test_an_error_of_the_command_is_a_message_and_status_3(self, hf_tying, tmp_path):
        get_peft_model(base_of("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
        for source in ("lora", "nothing"):
            status, output, error = hf_tying("export", tmp_path / source, tmp_path / "out")
            assert (status, output) == (3, "")
            assert source in error and "Traceback" not in error
