"""Tiny random models of many architectures: the coverage list of the suite, and the inputs that each one takes."""

import copy
from collections.abc import Iterable

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

VOCAB, WIDTH = 64, 16

_DECODER = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_ENCODER = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
_SEQ2SEQ = dict(
    vocab_size=VOCAB, d_model=WIDTH, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=1,
    bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
)  # fmt: skip
_SPECIAL = {
    "gpt2": dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2),
    "opt": dict(
        vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=WIDTH,
    ),
    "falcon": dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2),
    "mamba": dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, state_size=4),
    "gemma3_text": dict(_DECODER, head_dim=8, sliding_window=16),
    "qwen3": dict(_DECODER, head_dim=8),
    "mixtral": dict(_DECODER, num_local_experts=2, num_experts_per_tok=1),
    "albert": dict(_ENCODER, embedding_size=WIDTH),
    "modernbert": dict(_ENCODER, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    "t5": dict(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0,
        decoder_start_token_id=0,
    ),
    "llava": dict(
        text_config=dict(_DECODER, model_type="llama", tie_word_embeddings=True),
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, image_size=8, patch_size=4,
        ),
        image_token_index=VOCAB - 1, tie_word_embeddings=True,
    ),
}  # fmt: skip

CAUSAL = ["gpt2", "llama", "qwen3", "gemma3_text", "mistral", "mixtral", "gpt_neox", "opt", "falcon", "phi", "mamba",
          "olmo2"]  # fmt: skip
MASKED = ["bert", "roberta", "deberta-v2", "modernbert", "albert"]
SEQ2SEQ = ["t5", "bart", "marian"]
COMPOSITE = ["llava"]
ALL = CAUSAL + MASKED + SEQ2SEQ + COMPOSITE

AUTO = {
    **dict.fromkeys(CAUSAL, AutoModelForCausalLM),
    **dict.fromkeys(MASKED, AutoModelForMaskedLM),
    **dict.fromkeys(SEQ2SEQ, AutoModelForSeq2SeqLM),
    **dict.fromkeys(COMPOSITE, AutoModelForImageTextToText),
}
#: The scheme that each architecture's own tie amounts to.
FULL_SCHEME = {**dict.fromkeys(ALL, "two_way"), **dict.fromkeys(SEQ2SEQ, "three_way")}


def tiny_config(arch: str, **changes):
    """A config of a few thousand parameters; `changes` go to its constructor."""
    if arch in _SPECIAL:
        kwargs = _SPECIAL[arch]
    elif arch in SEQ2SEQ:
        kwargs = _SEQ2SEQ
    else:
        kwargs = _ENCODER if arch in MASKED else _DECODER
    return AutoConfig.for_model(arch, **{**kwargs, **changes})


def tiny_model(arch: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A random model of `arch` in evaluation mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = AUTO[arch].from_config(tiny_config(arch, **changes), dtype=dtype)
    # Biases and padding rows start at zero, where many mistakes are invisible.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # not sinusoidal positions, which no file holds
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """`model` in training mode, with every dropout rate zero, in its modules and in their configs."""
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def tiny_inputs(model: PreTrainedModel, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Token ids (and labels) for one forward pass."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB - 4, (batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if model.config.model_type == "mamba":
        inputs.pop("attention_mask")
    return inputs


class Sentences(torch.utils.data.Dataset):
    """Sixteen sentences of six words, as `Trainer` takes them."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.randint(3, 60, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def logits(model: PreTrainedModel) -> torch.Tensor:
    """The model's logits on `tiny_inputs`, float32, with dropout off."""
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model(**tiny_inputs(model)).logits.float()
    model.train(training)
    return out


def half_of_tiny_inputs(model: PreTrainedModel, rank: int) -> dict[str, torch.Tensor]:
    """What each of two processes trains on where one process trains on `tiny_inputs`."""
    return {name: value[rank : rank + 1] for name, value in tiny_inputs(model).items()}


# --- plain torch, without the package: what the tests compare with ---------------------------------------------------


def untied_model(arch: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """As `tiny_model`, and every name of every role has a matrix of its own.

    `tie_word_embeddings=False` in every config that there is; where the class ties all the same (T5), by hand.
    """
    changes = {"tie_word_embeddings": False}
    if arch in COMPOSITE:
        changes["text_config"] = _SPECIAL[arch]["text_config"] | changes
    model = tiny_model(arch, seed, dtype, **changes)
    if arch == "t5":
        generator = torch.Generator().manual_seed(seed)
        for name in shared_names(model)[0][1:]:
            split(model, [name])
            with torch.no_grad():
                parameter = model.get_parameter(name)
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.02).to(dtype))
    return model


def shared_names(model: torch.nn.Module) -> list[list[str]]:
    """The names that stand for one parameter object, in the order of the modules, for each such object."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def split(model: torch.nn.Module, names: Iterable[str], value: torch.Tensor | None = None) -> None:
    """Give each of `names` a new parameter of its own, with the value that it has or with `value`."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        old = model.get_parameter(name)
        new = (old if value is None else value).detach().clone()
        setattr(model.get_submodule(path), attribute, torch.nn.Parameter(new, requires_grad=old.requires_grad))


def untied_twin(model: PreTrainedModel, untied: PreTrainedModel) -> PreTrainedModel:
    """`untied` (an untied model of the same architecture) with the values that `model` has under each name."""
    twin = copy.deepcopy(untied)
    values = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in twin.named_parameters(remove_duplicate=False):
            parameter.copy_(values[name])
    return twin


def layer_pair(model: PreTrainedModel) -> list[str]:
    """Two names of equal-shaped matrices that are no embeddings: the same place in two layers, where there are two."""
    matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    pairs = [[n, other] for n in matrices if (other := n.replace(".0.", ".1.", 1)) != n and other in matrices]
    # ALBERT has one set of weights for all its layers.
    pairs = pairs or [[n, other] for n in matrices if (other := n.replace("query", "key")) != n and other in matrices]
    return pairs[-1]
