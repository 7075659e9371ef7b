"""What the blocks of the documents stand on: small models under the names of well-known ones, small texts, small data.

A folder that has the name of a model on the Hub is what `from_pretrained` finds first, so a block runs offline as it
is printed. Folders and texts that a block names are made in the folder that it runs in.
"""

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from hf_tying.data import train_byte_level_bpe

TEXT = ["the old man reads a new book", "a green tree stands near the quiet river", "she writes long letters"] * 20
GERMAN = ["der alte Mann liest ein neues Buch", "ein Baum steht am stillen Fluss", "sie schreibt lange Briefe"] * 20

_DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
_QWEN = _DECODER | {"num_key_value_heads": 4, "head_dim": 8}
_SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip
_IDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
_S2S_IDS = _IDS | {"decoder_start_token_id": 0, "forced_eos_token_id": 0, "forced_bos_token_id": None}

#: By the name on the Hub: the Auto class, the model type, and its config.
MODELS: dict[str, tuple[type, str, dict[str, Any]]] = {
    "Qwen/Qwen3-0.6B": (AutoModelForCausalLM, "qwen3", _QWEN | {"tie_word_embeddings": True}),
    "Qwen/Qwen3-8B": (AutoModelForCausalLM, "qwen3", _QWEN | {"tie_word_embeddings": False}),
    "openai-community/gpt2": (
        AutoModelForCausalLM, "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128} | _IDS,
    ),
    "facebook/bart-base": (AutoModelForSeq2SeqLM, "bart", _SEQ2SEQ | _S2S_IDS),
    "Helsinki-NLP/opus-mt-en-de": (AutoModelForSeq2SeqLM, "marian", _SEQ2SEQ | _S2S_IDS),
    "google-bert/bert-base-uncased": (AutoModelForMaskedLM, "bert", _DECODER | {"pad_token_id": 0}),
}  # fmt: skip
#: By the name of the file: its text.
TEXTS = {
    "train.txt": "\n".join(TEXT),
    "valid.txt": "\n".join(TEXT[:12]),
    "train.en": "\n".join(TEXT),
    "train.de": "\n".join(GERMAN),
    "valid.en": "\n".join(TEXT[:3]),
    "valid.de": "\n".join(GERMAN[:3]),
}


@cache
def _tokenizer():
    return train_byte_level_bpe(TEXT + GERMAN, vocab_size=320)


def make(named: str, folder: Path, kept: Path) -> None:
    """Make what `named`, a text, names of models and files, in `folder`; models are made once, in `kept`."""
    for name, (auto, model_type, config) in MODELS.items():
        if name not in named:
            continue
        if not (kept / name).exists():
            torch.manual_seed(0)
            model = auto.from_config(AutoConfig.for_model(model_type, vocab_size=len(_tokenizer()), **config))
            model.save_pretrained(kept / name)
            _tokenizer().save_pretrained(kept / name)
        shutil.copytree(kept / name, folder / name)
    for name, text in TEXTS.items():
        if re.search(rf"(?<![\w/]){re.escape(name)}\b", named):
            (folder / name).write_text(text + "\n", encoding="utf-8")


def _load(name: str, auto: type = AutoModelForCausalLM):
    folder = Path("setup")
    if not (folder / name).exists():
        make(name, folder, folder / "kept")
    return auto.from_pretrained(folder / name)


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


#: What `with` can name: each gives one variable of a block.
SETUPS: dict[str, Callable[[], Any]] = {
    "model": lambda: _load("Qwen/Qwen3-8B"),
    "tied_model": lambda: _load("Qwen/Qwen3-0.6B"),
    "bart": lambda: _load("facebook/bart-base", AutoModelForSeq2SeqLM),
    "encoder": lambda: _load("google-bert/bert-base-uncased", AutoModel),
    "tokenizer": _tokenizer,
    "batch": _batch,
    "ids": lambda: _batch()["input_ids"],
    "data": lambda: [{"input_ids": ids, "labels": ids} for ids in _batch()["input_ids"].repeat(4, 1)],
}
