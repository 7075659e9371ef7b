"""Three small models of any encoder-decoder type with the same initial weights: untied, two_way, three_way."""

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ...ties.anatomy import roles
from ...ties.slots import find_parameter, find_slot
from ...ties.tying import tie
from ...training.translation import translation_config
from ..models import refuse_big, refusing, start_with_rows_of_unit_norm, takes

#: The scheme of each model by its name, which is also that of its folder.
SCHEMES = {"untied": "none", "two_way": "two_way", "three_way": "three_way"}

_SCRIPT = "run_translation.py"
_WIDTH = 128

# Sizes by their names in transformers' configs. Each config gets those that it has.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("d_model", "hidden_size"), _WIDTH),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 256),
    "d_kv": 32,
    # Xavier's rule for this width. With the usual 0.02, which is for wider models, attention is flat for hundreds of
    # steps.
    "init_std": _WIDTH**-0.5,
    "scale_embedding": True,  # Vaswani et al. 2017, section 3.4: rows of unit norm, times the root of the width
    **dict.fromkeys(("dropout", "dropout_rate", "attention_dropout", "activation_dropout"), 0.0),
}
# Fields that `translation_config` takes from the tokenizer.
_TOLD = (
    *("vocab_size", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_eos_token_id"),
)


def small_config(model_type: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PreTrainedConfig:
    """Make a config of a model type with the demo's sizes and the tokenizer's ids.

    Args:
        model_type (`str`): type as in `config.json`, such as `"marian"`.
        tokenizer: tokenizer of both languages.
        max_length (`int`): length of the longest sequence, in tokens.

    Raises:
        TyingError: transformers has no encoder-decoder of this type, or its config refuses these sizes.
    """
    told = translation_config(model_type, tokenizer)
    with refusing(model_type, _SCRIPT):
        fields = {name: size for name, size in _SIZES.items() if takes(told, name)}
        fields |= {name: getattr(told, name) for name in _TOLD if hasattr(told, name)}
        if takes(told, "max_position_embeddings"):
            fields["max_position_embeddings"] = max_length
        return AutoConfig.for_model(model_type, **fields)


def build_models(config: PreTrainedConfig, max_length: int, seed: int) -> dict[str, PreTrainedModel]:
    """Make an untied model and its tied twins. A tied matrix starts as the untied model's target embedding.

    Args:
        config: config of `small_config`.
        max_length (`int`): length of the longest translation, in tokens. It becomes the default of `generate`.
        seed (`int`): seed of the initial weights.

    Returns:
        `dict[str, PreTrainedModel]`: models by the names in `SCHEMES`.

    Raises:
        TyingError: the model cannot be built or trained on token ids, is too large, or cannot be tied in these ways.
    """
    refuse_big(config, AutoModelForSeq2SeqLM, _SCRIPT)
    with refusing(config.model_type, _SCRIPT):
        set_seed(seed)
        untied = _stock(config, "none")
        _start_apart(untied)
        _try_out(untied)
        models = {name: _stock(config, scheme) for name, scheme in SCHEMES.items() if scheme != "none"}
    for name, model in models.items():
        model.load_state_dict(untied.state_dict(), strict=False)  # only one of them has Marian's `shared`
        tie(model, SCHEMES[name], init_from="target")  # both schemes tie the target embedding
    models = {"untied": untied, **models}
    for model in models.values():
        model.generation_config.max_length = max_length
    return models


def _stock(config: PreTrainedConfig, scheme: str) -> PreTrainedModel:
    """Make an untied model in the form whose stock class has the ties of `scheme`.

    Marian has such a form for each scheme. In this form the file has each matrix once, and stock transformers tie it.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "share_encoder_decoder_embeddings"):
        config.share_encoder_decoder_embeddings = scheme == "three_way"
    return tie(AutoModelForSeq2SeqLM.from_config(config), "none")


def _start_apart(model: PreTrainedModel) -> None:
    """Draw each of the three matrices again, because tied ones have left copies of one draw."""
    for role in roles(model).values():
        start_with_rows_of_unit_norm(find_parameter(model, role.name))
        padding = getattr(find_slot(model, role.name)[0], "padding_idx", None)
        if padding is not None:
            with torch.no_grad():
                find_parameter(model, role.name)[padding] = 0  # as in stock models


def _try_out(model: PreTrainedModel) -> None:
    """Run a forward and a backward pass and generate a token on a copy: some types need more than token ids."""
    model, tokens = copy.deepcopy(model).train(), torch.full((1, 4), model.config.eos_token_id)
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.eval().generate(input_ids=tokens, max_length=2)
