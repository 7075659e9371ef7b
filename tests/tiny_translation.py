"""Tiny models of every stock translation architecture, and of encoder-decoders put together from two models."""

import torch
import transformers
from packaging import version
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    PreTrainedModel,
    RobertaConfig,
)

VOCAB, WIDTH = 64, 16
#: transformers 5.17 counts the words of a beam by `vocab_size`, which is the source's where Marian has two sizes.
COUNTS_BEAMS_BY_THE_SOURCE = version.parse(transformers.__version__) < version.parse("5.23")

_BART = dict(
    vocab_size=VOCAB, d_model=WIDTH, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, pad_token_id=1,
    bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
_T5 = dict(
    vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=2,
    decoder_start_token_id=0,
)  # fmt: skip
_STOCK = {
    "marian": dict(_BART),
    "marian_separate": dict(_BART, model_type="marian", share_encoder_decoder_embeddings=False),
    "bart": dict(_BART),
    "mbart": dict(_BART),
    "m2m_100": dict(_BART),
    "pegasus": dict(_BART),
    "blenderbot-small": dict(_BART),
    "plbart": dict(_BART),
    "led": dict(
        {k: v for k, v in _BART.items() if k != "max_position_embeddings"}, max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32, attention_window=[4],
    ),
    "prophetnet": dict(
        vocab_size=VOCAB, hidden_size=WIDTH, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=2,
        num_decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ),
    "fsmt": dict(
        {k: v for k, v in _BART.items() if k != "vocab_size"}, langs=["en", "de"],
        src_vocab_size=VOCAB, tgt_vocab_size=VOCAB, tie_word_embeddings=True,
        num_hidden_layers=1,
    ),
    "t5": dict(_T5),
    "mt5": dict(_T5),
    "umt5": dict(_T5),
    "switch_transformers": dict(
        _T5, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2,
        expert_capacity=64,
    ),
}  # fmt: skip
STOCK = list(_STOCK)
#: `EncoderDecoderModel`s: encoder and decoder of one family or of two.
JOINED = ["bert2bert", "roberta2roberta", "bert2gpt2"]
SCHEMES = ["none", "two_way", "source_target", "three_way"]


def translation_config(arch: str, **changes):
    """The config of `arch`; `changes` go to its constructor."""
    fields = {**_STOCK[arch], **changes}
    return AutoConfig.for_model(fields.pop("model_type", arch), **fields)


def part_config(family: str, decoder: bool, vocab: int = VOCAB, **changes):
    """An encoder or a decoder with cross-attention for an `EncoderDecoderModel`."""
    role = dict(is_decoder=True, add_cross_attention=True) if decoder else {}
    if family == "gpt2":
        kwargs = dict(n_embd=WIDTH, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
        return GPT2Config(**{**kwargs, "vocab_size": vocab, **role, **changes})
    kwargs = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                  max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    config_class = {"bert": BertConfig, "roberta": RobertaConfig}[family]
    return config_class(**{**kwargs, "vocab_size": vocab, **role, **changes})


def joined_config(arch: str, target_vocab: int = VOCAB) -> EncoderDecoderConfig:
    """The config of an `EncoderDecoderModel`."""
    encoder, decoder = arch.split("2", 1)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        part_config(encoder, False), part_config(decoder, True, target_vocab)
    )
    config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = 0, 1, 2
    return config


def shake(model: PreTrainedModel) -> PreTrainedModel:
    """Every parameter off its start: biases and padding rows begin at zero, where mistakes are invisible."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def translation_model(arch: str, target_vocab: int = VOCAB, **changes) -> PreTrainedModel:
    """A random stock model, as its own config ties it; `target_vocab` where the architecture has a second size."""
    torch.manual_seed(0)
    if arch in JOINED:
        return shake(EncoderDecoderModel(joined_config(arch, target_vocab)))
    if target_vocab != VOCAB:
        changes |= {"fsmt": {"tgt_vocab_size": target_vocab, "tie_word_embeddings": False}}.get(
            arch, {"decoder_vocab_size": target_vocab}
        )
    return shake(AutoModelForSeq2SeqLM.from_config(translation_config(arch, **changes)))


def translation_inputs(model: PreTrainedModel, batch: int = 2, source: int = 7, target: int = 5) -> dict:
    """Ids of the source and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (batch, source), generator=generator)
    labels = torch.randint(3, 50, (batch, target), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if model.config.model_type == "fsmt":  # shifts the source, not the labels
        inputs["decoder_input_ids"] = torch.cat([torch.full((batch, 1), 2), labels[:, :-1]], dim=1)
    return inputs


def translation_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits in float32 with dropout off."""
    model.eval()
    with torch.no_grad():
        return model(**translation_inputs(model)).logits.float().contiguous()


def beam_count(model: PreTrainedModel, usual: int) -> int:
    """How many beams stock transformers can search with: `usual`, or 1 if it can search with none."""
    two_sizes = model.config.model_type == "marian" and model.config.vocab_size != model.config.decoder_vocab_size
    return 1 if two_sizes and COUNTS_BEAMS_BY_THE_SOURCE else usual


def beams(model: PreTrainedModel, **kwargs) -> torch.Tensor:
    """What beam search with a cache gives for the sources of `translation_inputs`."""
    inputs = translation_inputs(model)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    inputs |= {"num_beams": beam_count(model, 3), "max_new_tokens": 6, "do_sample": False}
    return model.eval().generate(**inputs, **kwargs).contiguous()


def translation_step(model: PreTrainedModel) -> None:
    """One step of gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**translation_inputs(model)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def nearly_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the last place: a loaded tensor can lie otherwise in memory and take another kernel."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-6)
