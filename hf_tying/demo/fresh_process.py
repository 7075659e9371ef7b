"""A script that loads a saved model in a new process and scores it.

It is run by its path, so that the package is imported only on request:

    python -P fresh_process.py BLOCKS.safetensors ANSWER.safetensors MODEL_FOLDER [hf_tying]

The demo uses the same `score`, so both results are computed by the same code.
"""

import sys
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def score(model: "PreTrainedModel", blocks: torch.Tensor, batch_size: int = 32) -> dict[str, torch.Tensor]:
    """Compute the mean loss of all blocks, the logits of the first block, and the number of parameters.

    Args:
        model: causal language model.
        blocks (`torch.Tensor`): token ids, `(blocks, length)`, int64.
        batch_size (`int`): number of blocks in a batch. Default 32.

    Returns:
        `dict[str, torch.Tensor]`: `loss`, mean negative log-likelihood in nats, a float64 scalar; `logits`,
        `(length, vocabulary)`, float32; `parameters`, number of parameters, each counted once.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    with torch.inference_mode():
        for batch in blocks.to(model.device).split(batch_size):
            loss = model(input_ids=batch, labels=batch).loss
            total += loss.double().cpu() * len(batch)
        logits = model(input_ids=blocks[:1].to(model.device)).logits[0]
    return {
        "loss": total / len(blocks),
        "logits": logits.float().cpu().clone(),
        "parameters": torch.tensor(sum(parameter.numel() for parameter in model.parameters())),
    }


def main(blocks_file: str, answer_file: str, folder: str, plugin: str | None = None) -> None:
    """Load the model of a folder, score it, and write the result.

    Args:
        blocks_file: safetensors file with `blocks`.
        answer_file: safetensors file to write.
        folder: folder of the model and its tokenizer.
        plugin: `"hf_tying"` to import the package first, and check the ties. Default: stock transformers.

    Raises:
        RuntimeError: without `plugin`, the package was imported all the same.
    """
    if plugin:
        from hf_tying import assert_tied
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if plugin:
        assert_tied(model)
    elif "hf_tying" in sys.modules:
        raise RuntimeError("hf_tying was imported: this process proves nothing about plain transformers")
    save_file(score(model, load_file(blocks_file)["blocks"]), answer_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
