"""What `headless.py` is made of: texts in blocks, the models, a time budget, perplexity of both kinds of model."""

import math
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_tying.config import TyingError
from hf_tying.data import blocks_for_language_modeling, train_byte_level_bpe

#: Layers, width, heads. `small` is the paper's small decoder (Figure 7), `base` the BERT of its ablation (L4-H512).
SIZES = {"tiny": (2, 64, 2), "small": (3, 192, 3), "base": (4, 512, 8)}
#: A masked model's evaluation masks every seventh token at a time, about the 15% of its training.
PASSES = 7


def read_blocks(folder: str, vocab_size: int, block_size: int, masked: bool):
    """The tokenizer of a folder's training text, and its three texts in blocks."""
    lines = {}
    for name in ("train", "valid", "test"):
        path = Path(folder, f"{name}.txt")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TyingError(f"{path} cannot be read ({error}): expected UTF-8 text, a sentence on a line.") from None
        lines[name] = [line.strip() for line in text.split("\n") if line.strip()]
        if not lines[name]:
            raise TyingError(f"{path} is empty: expected text, a sentence on a line.")
    tokenizer = train_byte_level_bpe(lines["train"], vocab_size - masked)
    if masked:
        tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": tokenizer.eos_token})
    blocks = {name: blocks_for_language_modeling(part, tokenizer, block_size) for name, part in lines.items()}
    return tokenizer, blocks


def make_model(kind: str, size: str, tokenizer, block_size: int):
    """A new GPT-2 or BERT, tied as these are."""
    layers, width, heads = SIZES[size]
    if kind == "causal":
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer), n_positions=block_size, n_embd=width, n_layer=layers, n_head=heads, **ids
            )
        )
    return BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=block_size,
            pad_token_id=None,  # there is no padding, and every row is trained
        )
    )


class TimeBudget(TrainerCallback, ExportableState):
    """Train for so many seconds: a rate that is warmed up over a twentieth of them and then goes down to 0.

    Of several processes, the clock of the first decides: all have its rate, and stop after the same step. The share of
    the time that is over goes with a checkpoint.
    """

    def __init__(self, seconds: float):
        self.seconds, self.share = seconds, 0.0

    def state(self):
        return {"args": {"seconds": self.seconds}, "attributes": {"share": self.share}}

    def on_train_begin(self, args, state, control, **kwargs):
        self.share = state.stateful_callbacks["TimeBudget"]["attributes"]["share"]
        self.started = time.monotonic() - self.share * self.seconds

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        share = self.share
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * max(min(share / 0.05, (1 - share) / 0.95), 0.0)

    def on_step_end(self, args, state, control, **kwargs):
        (self.share,) = broadcast_object_list([(time.monotonic() - self.started) / self.seconds])
        if self.share >= 1:
            control.should_training_stop = control.should_save = True


@torch.no_grad()
def perplexity(model, blocks, tokenizer, batch_size: int) -> float:
    """exp of the mean loss of a token; of a masked model each is predicted once, from those that are not masked."""
    model.eval()
    total = tokens = 0
    for start in range(0, len(blocks), batch_size):
        ids = torch.tensor(blocks[start : start + batch_size]["input_ids"], device=model.device)
        if tokenizer.mask_token_id is None:
            total += F.cross_entropy(
                model(input_ids=ids).logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            ).item()
            tokens += ids[:, 1:].numel()
            continue
        for first in range(PASSES):
            seen = ids.clone()
            seen[:, first::PASSES] = tokenizer.mask_token_id
            hidden = model.bert(input_ids=seen).last_hidden_state[:, first::PASSES]
            logits = model.cls(hidden).float()  # of the masked places alone
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, first::PASSES].flatten(), reduction="sum").item()
            tokens += logits.shape[:-1].numel()
    return math.exp(min(total / tokens, 700))
