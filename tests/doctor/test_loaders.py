"""The forecast: what the table says of transformers is what it does, loaded here; the rest by their rules."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_tying import TyingError
from hf_tying.doctor.loaders import LOADERS, OUTCOMES, forecast
from hf_tying.report.checkpoint import read_checkpoint
from hf_tying.report.opening import open_source

from . import planted


def stock_tied(folder):
    planted.tied(folder)


def stock_untied(folder):
    planted.untied(folder)


def tied_bart(folder):
    planted.tied(folder, "bart")


def what_transformers_does(folder) -> str:
    bart = json.loads((folder / "config.json").read_text())["model_type"] == "bart"
    auto = AutoModelForSeq2SeqLM if bart else AutoModelForCausalLM
    try:
        model, report = auto.from_pretrained(folder, output_loading_info=True)
    except RuntimeError:
        return "refuse"
    head, embedding = model.get_output_embeddings().weight, model.get_decoder().get_input_embeddings().weight
    if report["missing_keys"] and any("lm_head" in key or "embed" in key for key in report["missing_keys"]):
        return "random head"
    if head is embedding:
        return "tie"
    return "duplicate" if torch.equal(head, embedding) else "untie"


@pytest.mark.parametrize(
    "plant",
    [stock_tied, stock_untied, tied_bart, planted.two_matrices, planted.one_row, planted.head_missing,
     planted.embedding_missing, planted.head_missing_by_default, planted.head_missing_of_gpt2, planted.no_name,
     planted.written_twice, planted.equal_and_untied, planted.stale_vocabulary, planted.one_row_of_bart],
    ids=lambda plant: plant.__name__,
)  # fmt: skip
def test_transformers_does_what_the_table_says(plant, tmp_path):
    plant(tmp_path / "model")
    (said,) = forecast(read_checkpoint(open_source(tmp_path / "model")), ["transformers"])
    assert said.outcome == what_transformers_does(tmp_path / "model")


@pytest.mark.parametrize(
    "plant, outcomes",
    [
        (stock_tied, {"vllm": "tie", "sglang": "tie", "llama.cpp": "tie", "mlx": "tie", "onnx": "tie"}),
        (stock_untied, {"vllm": "untie", "sglang": "untie", "llama.cpp": "untie", "mlx": "untie"}),
        (planted.two_matrices, {"vllm": "head dropped", "llama.cpp": "untie", "mlx": "head dropped"}),
        (planted.head_missing, {"vllm": "refuse", "sglang": "random head", "llama.cpp": "tie", "mlx": "refuse"}),
        (planted.head_missing_by_default, {"vllm": "refuse", "mlx": "tie"}),
        (planted.equal_and_untied, {"vllm": "duplicate", "llama.cpp": "duplicate"}),
        (planted.gguf_with_both, {"llama.cpp": "duplicate", "vllm": "unknown"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_others_by_their_rules(plant, outcomes, tmp_path):
    plant(tmp_path / "model")
    found = {each.loader: each.outcome for each in forecast(read_checkpoint(open_source(tmp_path / "model")))}
    assert set(found) == set(LOADERS) and set(found.values()) <= set(OUTCOMES)
    assert {name: found[name] for name in outcomes} == outcomes


def test_an_unknown_loader_is_named(tmp_path):
    planted.tied(tmp_path / "model")
    with pytest.raises(TyingError, match="'tgi'.*vllm"):
        forecast(read_checkpoint(open_source(tmp_path / "model")), ["tgi"])
