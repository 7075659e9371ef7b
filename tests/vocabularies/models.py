"""Tiny translation models with two vocabularies, before and after these are joined, and what they answer."""

import copy

import torch

from hf_tying.vocabularies import JointTokenizer, join_vocabularies

from ..tiny_translation import VOCAB, translation_inputs, translation_model
from .two_vocabularies import TARGET, tokenizers_for


def model_for(arch: str, dtype=torch.float32):
    changes = {"tie_word_embeddings": False} if arch == "bart" else {}
    model = translation_model(arch, target_vocab=VOCAB if arch == "bart" else TARGET, **changes)
    return model.to(dtype).eval()


def rows_of(arch: str) -> int:
    return VOCAB if arch == "bart" else TARGET


def joined(arch: str, dtype=torch.float32, **kwargs):
    """A joined model beside one as it was, and the tokenizers of all."""
    model = model_for(arch, dtype)
    source, target = tokenizers_for(arch, target_rows=rows_of(arch))
    before = copy.deepcopy(model)
    model, tokenizer = join_vocabularies(model, source, target, **kwargs)
    return before, model, source, target, tokenizer


def in_joint_ids(ids: torch.Tensor, tokenizer: JointTokenizer) -> torch.Tensor:
    return ids.clone().apply_(lambda index: tokenizer.joint.source_ids[index])


def logits(model, tokenizer: JointTokenizer | None = None) -> torch.Tensor:
    inputs = translation_inputs(model)
    inputs["decoder_input_ids"] = inputs.pop("labels")
    if tokenizer is not None:
        inputs["input_ids"] = in_joint_ids(inputs["input_ids"], tokenizer)
    with torch.no_grad():
        return model(**inputs).logits.float()


def generated(model, tokenizer: JointTokenizer | None = None, **kwargs) -> torch.Tensor:
    inputs = translation_inputs(model)
    del inputs["labels"]
    if tokenizer is not None:
        inputs["input_ids"] = in_joint_ids(inputs["input_ids"], tokenizer)
    return model.generate(**inputs, max_new_tokens=8, max_length=None, do_sample=False, **kwargs)
