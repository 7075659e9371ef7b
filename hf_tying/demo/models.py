"""A pair of small models of any causal type that start from the same weights, one untied, one tied."""

import copy
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..config import TyingError, nearest
from ..ties.anatomy import roles
from ..ties.slots import find_parameter
from ..ties.tying import tie

# Two minutes on two cores are too short for more.
_MOST_PARAMETERS = 20_000_000

# Sizes by the names that transformers' configs use; each config takes those that it has.
_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "word_embed_proj_dim": 128,
    "intermediate_size": 384,
    "ffn_dim": 384,
    "ffn_hidden_size": 384,
    "moe_intermediate_size": 192,
    "shared_expert_intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rotary_dim": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}


def small_config(model_type: str, vocab_size: int, block_size: int) -> PreTrainedConfig:
    """A config of `model_type` with the demo's sizes, untied.

    Args:
        model_type (`str`): as in `config.json`, `"llama"` for instance.
        vocab_size (`int`): rows of the embedding.
        block_size (`int`): longest sequence, in tokens.

    Raises:
        TyingError: if transformers has no causal language model of this type, or its config refuses these sizes.
    """
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise TyingError(
            f"Unknown model type {model_type!r}: expected a causal language model of transformers"
            f"{nearest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}."
        )
    with refusing(model_type):
        default = AutoConfig.for_model(model_type)
        return AutoConfig.for_model(
            model_type,
            **{name: size for name, size in _SIZES.items() if takes(default, name)},
            vocab_size=vocab_size,
            max_position_embeddings=block_size,
            tie_word_embeddings=False,
            is_decoder=True,
            # Documents are closed, not padded, by the one special token: no row may be exempt from the gradient.
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )


def build_pair(config: PreTrainedConfig, scheme: str, seed: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The untied model and its tied twin, whose tied matrix starts as the untied one's input embedding.

    Args:
        config: what `small_config` made.
        scheme (`str`): what to tie.
        seed (`int`): of the initial weights.

    Returns:
        `tuple[PreTrainedModel, PreTrainedModel]`: untied, tied.

    Raises:
        TyingError: if the model cannot be built or trained on plain text, is too big, or cannot be tied in this way.
    """
    refuse_big(config, AutoModelForCausalLM)
    with refusing(config.model_type):
        set_seed(seed)
        untied = AutoModelForCausalLM.from_config(config)
        start_with_rows_of_unit_norm(untied.get_input_embeddings().weight)
        _try_out(untied)
    return untied, tie(copy.deepcopy(untied), scheme, init_from="target")


def differing_at_the_start(untied: PreTrainedModel, tied: PreTrainedModel) -> list[str]:
    """Names of the tied model's parameters with other values than the untied one's: none, for a fair comparison."""
    values = dict(untied.named_parameters())
    # Where another of the tied matrices comes first in the model, the one that they are goes by its name.
    shared, embedding = (find_parameter(model, roles(model)["target"].name) for model in (tied, untied))
    return [
        name
        for name, value in tied.named_parameters()
        if not torch.equal(value, embedding if value is shared else values[name])
    ]


def start_with_rows_of_unit_norm(embedding: torch.nn.Parameter) -> None:
    """Draw an embedding from N(0, 1 / width) in place of N(0, 0.02^2), for all models: each ends better by it.

    AdamW moves every row of a softmax matrix by a full learning rate from the first step on, whether its word occurs
    or not, and all in much the same direction. Rows that start small are soon alike, and a tied model reads by them.
    """
    torch.nn.init.normal_(embedding, std=embedding.shape[1] ** -0.5)


def _try_out(model: PreTrainedModel) -> None:
    """One forward and backward pass on a copy: not every model of the list can be trained on token ids alone."""
    tokens = torch.zeros((1, 4), dtype=torch.long)
    copy.deepcopy(model).train()(input_ids=tokens, labels=tokens).loss.backward()


def takes(config: PreTrainedConfig, name: str) -> bool:
    """Whether a size of this name may be set: the config has it, with a value, and does not compute it."""
    computed = getattr(type(config), name, None)
    if isinstance(computed, property) and computed.fset is None:
        return False
    return getattr(config, name, None) is not None or (name == "head_dim" and hasattr(config, name))


def refuse_big(config: PreTrainedConfig, auto_class: type, script: str = "run_clm.py") -> None:
    """Refuse what `auto_class` would make of a config if it is too big for a demo; no weight is made for that."""
    with refusing(config.model_type, script), torch.device("meta"):
        size = auto_class.from_config(config).num_parameters()
    if size > _MOST_PARAMETERS:
        raise TyingError(
            f"The smallest {config.model_type!r} that the demo can ask for has {size:,} parameters: expected at most "
            f"{_MOST_PARAMETERS:,}. Choose another type, or train it with examples/{script} and --config_overrides."
        )


@contextmanager
def refusing(model_type: str, script: str = "run_clm.py") -> Iterator[None]:
    """Turn whatever a model class raises about sizes it cannot have into one clear error."""
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise TyingError(
            f"The demo cannot train a small {model_type!r}, which asks for more than sizes and token ids ({reason}). "
            f"Choose another --model_type, or train it with examples/{script} and --config_overrides."
        ) from error
