"""`export_layers`: shared layers for loaders that do not know this package, a plain model or a LoRA over one."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from hf_tying import TyingError, harden, share_layers, tie
from hf_tying.config import TyingConfig
from hf_tying.doctor import export_layers, rewrite

from ..cli.examples import example_of
from ..processes import run_python
from ..tiny import AUTO, logits, tiny_inputs, tiny_model

LENGTHS = {"gpt2": {"n_layer": 4}, "t5": {"num_layers": 4}}


def shared(name="llama", relax=True, **settings):
    """A model with shared layers, whose differences are not zero any more."""
    model = tiny_model(name, **LENGTHS.get(name, {"num_hidden_layers": 4}))
    relax = {"rank": 3} if relax is True else relax
    share_layers(model, **({"order": [0, 1, 1, 0]} | settings), relax=relax or None)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "_relaxation" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def stock(name, folder):
    return AUTO[name].from_pretrained(folder).eval()


def near(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("relax", [None, True, {"kind": "scale"}], ids=["exact", "relaxed", "of another kind"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_an_unrolled_folder_is_a_plain_model(name, relax, tmp_path):
    model = shared(name, relax, save_format="dedup")
    export_layers(saved(model, tmp_path / "model"), tmp_path / "plain")
    assert "tying" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (tmp_path / "plain" / "tokenizer.json").exists() and sorted(p.name for p in tmp_path.iterdir()) == [
        "model", "plain",
    ]  # fmt: skip
    plain = stock(name, tmp_path / "plain")
    assert len({id(p) for p in plain.parameters()}) == len(tiny_model_parameters(name))
    assert torch.equal(logits(plain), logits(model))


def tiny_model_parameters(name):
    return dict(tiny_model(name, **LENGTHS.get(name, {"num_hidden_layers": 4})).named_parameters())


def test_other_ties_stay(tmp_path):
    names = ["model.layers.0.input_layernorm.weight", "model.norm.weight"]
    model = tie(shared(private=["*norm*"]), names, init_from="mean")
    export_layers(saved(model, tmp_path / "model"), tmp_path / "plain")
    entry = json.loads((tmp_path / "plain" / "config.json").read_text())["tying"]
    assert "depth" not in entry and [*entry["groups"].values()] == [names]
    assert torch.equal(logits(stock("llama", tmp_path / "plain")), logits(model))


def test_an_albert_gets_a_group_for_each_layer(tmp_path):
    model = tiny_model("albert", num_hidden_layers=4)
    export_layers(saved(model, tmp_path / "model"), tmp_path / "plain")
    plain = stock("albert", tmp_path / "plain")
    assert plain.config.num_hidden_groups == 4 and torch.equal(logits(plain), logits(model))


#: Model, its settings, and the `layer_replication` of its adapter where PEFT repeats blocks.
ADAPTERS = {
    "llama": ("llama", {}, [[0, 2], [1, 2], [0, 1]]),
    "bert": ("bert", {}, [[0, 2], [1, 2], [0, 1]]),
    "settings by layer": ("qwen3", {}, None),  # `layer_types` of the config
    "another place": ("opt", {}, None),
    "transposed": ("gpt2", {}, None),
    "two stacks": ("t5", {}, None),
    "private norms": ("llama", {"private": ["*NORM*"]}, None),
}


@pytest.fixture(scope="module", params=ADAPTERS)
def adapter(request, tmp_path_factory):
    """Name of the model, its logits, its folder, its adapter, and the replication that is expected."""
    name, settings, blocks = ADAPTERS[request.param]
    folder = tmp_path_factory.mktemp("adapters")
    model = shared(name, **settings)
    export_layers(saved(model, folder / "model"), folder / "lora", "lora")
    return name, logits(model), folder / "model", folder / "lora", blocks


def test_peft_computes_the_same(adapter):
    name, expected, _, folder, blocks = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["layer_replication"] == blocks and config["base_model_name_or_path"] == str(folder / "base")
    assert (folder / "base" / "tokenizer.json").exists()
    base = stock(name, folder / "base")
    assert TyingConfig.in_config(base.config).depth == []
    assert base.config.num_hidden_layers == (2 if blocks else 4)
    before = logits(base)
    assert (before - expected).abs().max() > 1e-3
    lora = PeftModel.from_pretrained(base, folder).eval()
    assert not any("_relaxation" in key for key, _ in lora.named_parameters())
    near(logits(lora), expected)


@pytest.mark.parametrize("adapter", ["llama"], indirect=True)
def test_replicate_chooses_the_base_model(adapter, tmp_path):
    _, expected, source, folder, _ = adapter
    export_layers(source, tmp_path / "lora", "lora", replicate=False)
    base = stock("llama", tmp_path / "lora" / "base")
    assert base.config.num_hidden_layers == 4
    near(logits(PeftModel.from_pretrained(base, tmp_path / "lora")), expected)
    size, smaller = ((at / "base" / "model.safetensors").stat().st_size for at in (tmp_path / "lora", folder))
    assert smaller < 0.8 * size


@pytest.mark.parametrize("adapter", ["private norms", "settings by layer"], indirect=True)
def test_blocks_that_peft_does_not_repeat_are_refused_with_the_reason(adapter, tmp_path):
    with pytest.raises(TyingError, match="PEFT cannot repeat .*(not shared|'layer_types').*leave replicate=True out"):
        export_layers(adapter[2], tmp_path / "lora", "lora", replicate=True)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_process_without_this_package_computes_the_same(tmp_path):
    model = shared()
    saved(model, tmp_path / "model")
    export_layers(tmp_path / "model", tmp_path / "plain")
    export_layers(tmp_path / "model", tmp_path / "lora", "lora")
    torch.save((tiny_inputs(model), logits(model)), tmp_path / "expected.pt")
    program = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
inputs, expected = torch.load("{tmp_path}/expected.pt")
plain, base = (AutoModelForCausalLM.from_pretrained("{tmp_path}/" + name) for name in ("plain", "lora/base"))
for model in (plain, PeftModel.from_pretrained(base, "{tmp_path}/lora")):
    torch.testing.assert_close(model.eval()(**inputs).logits, expected, atol=1e-5, rtol=0)
assert not any(name.startswith("hf_tying") for name in sys.modules)
"""
    run_python("-c", program)


class TestTheCommand:
    def test_the_example_of_the_help_writes_a_plain_model(self, hf_tying, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        model = shared()
        saved(model, tmp_path / "my-model")
        status, output, _ = hf_tying(*example_of(hf_tying, "export"))
        assert status == 0 and "unrolled" in output
        assert torch.equal(logits(stock("llama", tmp_path / "plain")), logits(model))

    def test_an_adapter_and_what_it_is(self, hf_tying, tmp_path):
        saved(shared(), tmp_path / "model")
        status, output, _ = hf_tying("export", tmp_path / "model", tmp_path / "lora", "--no-replicate", "--json")
        report = json.loads(output)
        assert status == 0 and report["r"] == 3 and report["base_model"] == str(tmp_path / "lora" / "base")
        assert report["modules"] == 2 * 7
        assert report["parameters"] == 2 * 3 * (4 * (16 + 16) + 3 * (16 + 32))

    def test_a_refusal_is_one_message(self, hf_tying, tmp_path):
        saved(shared(relax=False), tmp_path / "model")
        for arguments in (["--format", "lora"], ["--format", "unrolled", "--replicate"]):
            status, output, error = hf_tying("export", tmp_path / "model", tmp_path / "out", *arguments)
            assert (status, output) == (3, "") and "Traceback" not in error
        assert not (tmp_path / "out").exists()


REFUSED = {
    "nothing shared": (lambda: tiny_model("llama"), "unrolled", "no shared layers"),
    "no differences": (lambda: shared(relax=False), "lora", "no differences.*The format 'unrolled'"),
    "hardened": (lambda: harden(shared()), "lora", "no differences"),
    "scales": (lambda: shared(relax={"kind": "scale"}), "lora", "relaxed by 'lora' without a bound"),
    "bounded": (lambda: shared(relax={"rank": 2, "bound": 0.1}), "lora", "relaxed by 'lora' without a bound"),
    "grown": (lambda: share_layers(tiny_model("llama"), order=[0, 1, 1], grow=True), "unrolled", "a factor of what"),
    "grown, lora": (lambda: share_layers(tiny_model("llama"), order=[0, 1, 1], grow=True), "lora", "a factor of what"),
    "format": (shared, "onnx", "Unknown format 'onnx'"),
}


class TestRefusals:
    @pytest.mark.parametrize("case", REFUSED)
    def test_nothing_is_written(self, case, tmp_path):
        make, format, message = REFUSED[case]
        make().save_pretrained(tmp_path / "model")
        with pytest.raises(TyingError, match=message):
            export_layers(tmp_path / "model", tmp_path / "out", format)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_a_folder_with_something_in_it(self, tmp_path):
        saved(shared(), tmp_path / "model")
        with pytest.raises(TyingError, match="exists already"):
            export_layers(tmp_path / "model", tmp_path / "model")

    def test_rewriting_names_the_way(self, tmp_path):
        shared(relax=False).save_pretrained(tmp_path / "model")
        with pytest.raises(TyingError, match="hf-tying export --format unrolled"):
            rewrite(tmp_path / "model", tmp_path / "out", "portable")

    def test_a_class_that_transformers_does_not_have(self, tmp_path):
        saved(shared(), tmp_path / "model")
        file = tmp_path / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["MyModel"]}))
        with pytest.raises(TyingError, match="MyModel.*unroll"):
            export_layers(tmp_path / "model", tmp_path / "out")


def test_the_base_model_of_a_headless_file(tmp_path):
    """A Falcon has its layers where PEFT looks, as a base model."""
    model = tiny_model("falcon", num_hidden_layers=4).transformer
    share_layers(model, "cycle", 2, relax={"rank": 2})
    export_layers(saved(model, tmp_path / "model"), tmp_path / "lora", "lora")
    ids = torch.tensor([[3, 4, 5]])
    base = AutoModel.from_pretrained(tmp_path / "lora" / "base")
    lora = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    near(lora(ids).last_hidden_state, model(ids).last_hidden_state)
    assert lora.peft_config["default"].layer_replication == [[0, 2], [0, 2]]
