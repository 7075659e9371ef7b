"""Ties beyond one matrix under several names: shared layers, plain, with differences, with factors; a relaxed pair."""

from collections.abc import Callable

from transformers import PreTrainedModel

from hf_tying import TyingConfig, share_layers, tie

from ..engines import different
from ..tiny import tiny_model

#: Four layers, by the fields of each config.
LENGTHS = {
    "gpt2": {"n_layer": 4},
    "t5": {"num_layers": 4},
    "bart": {"encoder_layers": 4, "decoder_layers": 4},
}
#: The pair that is relaxed where layers are not shared: root and member.
PAIRS = {
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "t5": ("shared.weight", "lm_head.weight"),
    "bart": ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
}
LOW_RANK = {"kind": "lora", "rank": 2}


def shared(model: PreTrainedModel, save_format: str | None = None, **settings) -> PreTrainedModel:
    return different(share_layers(model, "cycle", 2, save_format=save_format, **settings))


def relaxed_pair(model: PreTrainedModel, save_format: str | None = None) -> PreTrainedModel:
    pair = [*PAIRS[model.config.model_type]]
    groups = {"pair": {"names": pair, "relax": LOW_RANK}}
    return different(tie(model, TyingConfig(groups=groups, save_format=save_format), init_from=pair[0]))


#: Each takes a model with four layers and a form of its file. Differences and factors are not at their start.
KINDS: dict[str, Callable[..., PreTrainedModel]] = {
    "shared layers": shared,
    "shared layers, relaxed": lambda model, form=None: shared(model, form, relax=LOW_RANK),
    "shared layers, with factors": lambda model, form=None: shared(model, form, residual_factor=0.5),
    "relaxed pair": relaxed_pair,
}
RELAXED = ("shared layers, relaxed", "relaxed pair")


def plain(arch: str = "llama", **changes) -> PreTrainedModel:
    """A model with four layers and nothing tied, but for what its class ties without a flag."""
    sizes = LENGTHS.get(arch, {"num_hidden_layers": 4})
    return tiny_model(arch, **{"tie_word_embeddings": False, **sizes, **changes})


def made(kind: str, arch: str = "llama", save_format: str | None = None, **changes) -> PreTrainedModel:
    return KINDS[kind](plain(arch, **changes), save_format)


def names_in(kind: str) -> tuple[str, str]:
    """Root and member of a group of the Llama of `kind`."""
    if kind == "relaxed pair":
        return PAIRS["llama"]
    return "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
