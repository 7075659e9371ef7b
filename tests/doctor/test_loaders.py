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


def bart_without_a_head(folder):
    planted.untied(folder, "bart")
    planted.rewrite(folder, **{planted.HEAD: None})


def bart_tied_on_one_side(folder, save_format="portable"):
    planted.held(folder, "two_way", "bart", save_format=save_format)
    planted.edit(folder, tying=None)  # what a loader without this package reads


def bart_tied_on_one_side_once(folder):
    bart_tied_on_one_side(folder, "dedup")


def bart_written_twice(folder):
    planted.tied(folder, "bart")
    planted.rewrite(folder, **{planted.HEAD: planted.tensor(folder, "model.shared.weight").clone()})


def of_type(model_type, plant, **changes):
    """A llama whose config says it is another type, for loaders that go by that."""

    def planting(folder):
        plant(folder)
        planted.edit(folder, model_type=model_type, **changes)

    planting.__name__ = f"{model_type} {plant.__name__}"
    return planting


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
     planted.written_twice, planted.equal_and_untied, planted.stale_vocabulary, planted.one_row_of_bart,
     bart_without_a_head, bart_tied_on_one_side, bart_tied_on_one_side_once, bart_written_twice],
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
        (planted.dead_tensor, {"vllm": "refuse", "sglang": "tie", "llama.cpp": "refuse", "mlx": "refuse"}),
        (planted.projection, {"vllm": "tie", "llama.cpp": "refuse", "mlx": "refuse"}),
        (planted.pickle, {"transformers": "tie", "mlx": "refuse"}),
        (of_type("phi3", planted.written_twice), {"mlx": "refuse"}),
        (of_type("gemma3_text", planted.written_twice), {"mlx": "duplicate"}),
        (of_type("phi", planted.written_twice), {"mlx": "duplicate"}),
        (of_type("cohere", planted.two_matrices, logit_scale=1), {"mlx": "refuse"}),
        (of_type("granite", stock_tied), {"mlx": "refuse"}),
        (of_type("falcon", stock_tied), {"mlx": "refuse"}),
        (of_type(["llama"], stock_tied), {"mlx": "refuse"}),
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
