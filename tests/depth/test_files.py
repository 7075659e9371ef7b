"""The files of shared layers: short entries, plain tensors for stock, each block once on request."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
)

from hf_tying import (
    assert_tied,
    share_layers,
    tying_report,
)
from tests.tiny import logits, tiny_inputs

from .models import parameters, plain


def test_the_entry_is_short_and_stock_reads_the_file(tmp_path):
    model = share_layers(plain(), "cycle", 2)
    entry = model.config.tying
    assert entry["depth"] == [{"path": "model.layers", "order": [0, 1, 0, 1]}] and not entry["groups"]
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tying"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(stock), logits(model)) and parameters(stock) > parameters(model)


def test_dedup_has_each_block_once_and_stock_refuses_it(tmp_path):
    model = share_layers(plain(), "cycle", 2, save_format="dedup")
    model.save_pretrained(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    # The bytes of the formula: what is outside the layers, and two blocks.
    layer = parameters(plain().model.layers[0])
    expected = 4 * (parameters(plain()) - 4 * layer + 2 * layer)
    with file.open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    assert file.stat().st_size == header + expected and 4 * parameters(model) == expected
    optimizer = torch.optim.AdamW(model.parameters())
    model(**tiny_inputs(model)).loss.backward()
    optimizer.step()
    states = [state["exp_avg"] for state in optimizer.state_dict()["state"].values()]
    assert 4 * sum(state.numel() for state in states) == expected
    model.save_pretrained(tmp_path)
    assert not any(name.startswith(("model.layers.2.", "model.layers.3.")) for name in tensors)
    for cls in (AutoModelForCausalLM, AutoModel):
        loaded = cls.from_pretrained(tmp_path)
        assert_tied(loaded)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tying"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_base_model_of_the_file_is_shared_too(tmp_path):
    share_layers(plain(), "sequence", 2).save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert_tied(base)
    assert base.layers[0].mlp.up_proj.weight is base.layers[1].mlp.up_proj.weight


@pytest.mark.parametrize("save_format", ["portable", "dedup"])
@pytest.mark.parametrize("relax", [None, {"rank": 2}], ids=["exact", "relaxed"])
def test_the_report_on_the_file_is_that_on_the_model(save_format, relax, tmp_path):
    model = share_layers(plain(), "cycle", 2, init="svd" if relax else "first", relax=relax, save_format=save_format)
    model.save_pretrained(tmp_path)
    found, live = tying_report(tmp_path), tying_report(model)
    assert found.ok and not found.findings
    assert {tuple(group.names) for group in found.groups} == {tuple(group.names) for group in live.groups}
    assert found.parameters == live.parameters == parameters(model)
