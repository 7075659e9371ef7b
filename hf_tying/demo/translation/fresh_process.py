"""A script that loads saved models in a new process and translates with them.

It is run by its path, so that the package is imported only on request:

    python -P fresh_process.py QUESTION.safetensors ANSWER.safetensors (plain | hf_tying) MODEL_FOLDER...

The demo uses the same `answer`, so both results are computed by the same code.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def answer(model: "PreTrainedModel", question: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compute the logits of given translations, translations by beam search, and the number of parameters.

    Args:
        model: encoder-decoder.
        question (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`, `(sentences, source length)`; `labels`,
            `(sentences, target length)`; `num_beams` and `max_length`, scalars; all int64.

    Returns:
        `dict[str, torch.Tensor]`: `logits`, `(sentences, target length, vocabulary)`, float32; `beams`, token ids
        `(sentences, length)`; `parameters`, number of parameters, each counted once.
    """
    model.eval()
    inputs = {key: question[key].to(model.device) for key in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        logits = model(**inputs, labels=question["labels"].to(model.device)).logits
        beams = model.generate(
            **inputs,
            num_beams=question["num_beams"].item(),
            max_length=question["max_length"].item(),
            do_sample=False,
        )
    return {
        "logits": logits.float().cpu().clone(),
        "beams": beams.cpu().clone(),
        "parameters": torch.tensor(sum(parameter.numel() for parameter in model.parameters())),
    }


def main(question_file: str, answer_file: str, way: str, *folders: str) -> None:
    """Load the models of all folders, and write their results.

    Args:
        question_file: safetensors file with the input of `answer`.
        answer_file: safetensors file to write.
        way: `"hf_tying"` to import the package first, and check the ties; `"plain"` for stock transformers.
        *folders: folders of the models and their tokenizers.

    Raises:
        RuntimeError: under `"plain"`, the package was imported all the same.
    """
    if way == "hf_tying":
        from hf_tying import assert_tied
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    question, answers = load_file(question_file), {}
    for folder in folders:
        AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        if way == "hf_tying":
            assert_tied(model)
        elif "hf_tying" in sys.modules:
            raise RuntimeError("hf_tying was imported: this process proves nothing about plain transformers")
        answers |= {f"{Path(folder).name}/{key}": value for key, value in answer(model, question).items()}
    save_file(answers, answer_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
