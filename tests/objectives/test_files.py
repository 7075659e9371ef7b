"""Files hold a declared loss and nothing of an undeclared one; any reader opens them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_tying import TyingConfig, assert_tied, tie, use_tied_loss
from hf_tying.objectives.tied_loss import has_tied_loss

from ..forms import tied_model
from ..processes import run_python
from ..tiny import logits as logits_of
from ..tiny import tiny_model
from .helpers import DECLARED, UNTIED_HEAD, TiedGPT2, a_tied_gpt2, same, three_way, trains_by_blocks


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("make", [
    lambda: tiny_model("gpt2"), lambda: tied_model("in place"), lambda: tiny_model("llama"), three_way,
], ids=["gpt2", "tied gpt2", "llama", "bert2bert"])  # fmt: skip
def test_a_file_under_use_tied_loss_is_the_stock_one_byte_by_byte(make, tmp_path):
    stock, tied = make(), use_tied_loss(make(), label_smoothing=0.1)
    stock.save_pretrained(tmp_path / "stock")
    tied.save_pretrained(tmp_path / "tied")
    assert files(tmp_path / "tied") == files(tmp_path / "stock")
    assert not has_tied_loss(type(stock).from_pretrained(tmp_path / "tied"))


@pytest.mark.parametrize("load", [
    GPT2LMHeadModel.from_pretrained,
    AutoModelForCausalLM.from_pretrained,
    lambda folder: GPT2LMHeadModel(GPT2Config.from_pretrained(folder)),
    lambda folder: AutoModelForCausalLM.from_config(GPT2Config.from_pretrained(folder)),
], ids=["from_pretrained", "Auto", "from a config", "Auto from a config"])  # fmt: skip
def test_a_declared_loss_comes_with_the_file(load, seen, tmp_path):
    model = tie(tiny_model("gpt2", **UNTIED_HEAD), DECLARED, init_from="target")
    assert model.config.tying["loss"] == "tied"
    assert trains_by_blocks(model, seen)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert TyingConfig.from_dict(loaded.config.tying) == TyingConfig.from_dict(model.config.tying)
    assert_tied(loaded)
    assert trains_by_blocks(loaded, seen)


def test_a_declared_loss_comes_with_the_file_of_a_class_form(seen, tmp_path):
    a_tied_gpt2(loss="tied").save_pretrained(tmp_path)
    loaded = TiedGPT2.from_pretrained(tmp_path)
    assert loaded.config.tying_config.loss == "tied" and trains_by_blocks(loaded, seen)
    assert not has_tied_loss(a_tied_gpt2())


def test_a_model_without_a_head_loads_from_a_file_with_a_declared_loss_and_has_none(tmp_path):
    model = tie(tiny_model("gpt2"), DECLARED)
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert not has_tied_loss(body)
    assert torch.equal(body.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_transformers_alone_reads_a_file_with_a_declared_loss(tmp_path):
    model = tie(tiny_model("gpt2"), DECLARED)
    model.save_pretrained(tmp_path / "model")
    script = (
        "import sys, torch\n"
        "from tests.tiny import logits\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert 'hf_tying' not in sys.modules\n"
        "torch.save(logits(model), sys.argv[2])\n"
    )
    run_python("-c", script, tmp_path / "model", tmp_path / "logits.pt")
    assert same(torch.load(tmp_path / "logits.pt"), logits_of(model))
