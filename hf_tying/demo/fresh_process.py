"""Load a saved model in a process of its own and score it. Run by path, so that the package is imported only if asked:

    python -P fresh_process.py BLOCKS.safetensors ANSWER.safetensors MODEL_FOLDER [hf_tying]

The demo imports `score` as well: what is compared is computed by the same lines.
"""

import sys
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def score(model: "PreTrainedModel", blocks: torch.Tensor, batch_size: int = 32) -> dict[str, torch.Tensor]:
    """Mean negative log-likelihood of the blocks, logits of the first, and parameters counted once each.

    Args:
        model: a causal language model.
        blocks (`torch.Tensor`): token ids, `(blocks, length)`.
        batch_size (`int`): blocks at a time.

    Returns:
        `dict[str, torch.Tensor]`: `loss`, a float64 scalar in nats; `logits`, `(length, vocabulary)`; `parameters`.
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
