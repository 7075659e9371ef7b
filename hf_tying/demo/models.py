"""Two small models of any causal type with the same initial weights, one untied and one tied."""

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

# More parameters need more than two minutes on two cores.
_MOST_PARAMETERS = 20_000_000

# Sizes by their names in transformers' configs. Each config gets those that it has.
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
    """Make an untied config of a model type with the demo's sizes.

    Args:
        model_type (`str`): type as in `config.json`, such as `"llama"`.
        vocab_size (`int`): number of rows of the embedding.
        block_size (`int`): length of the longest sequence, in tokens.

    Raises:
        TyingError: transformers has no causal language model of this type, or its config refuses these sizes.
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
            # The only special token ends documents. It is not a padding token, whose row would get no gradient.
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )


def build_pair(config: PreTrainedConfig, scheme: str, seed: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Make an untied model and its tied twin. The tied matrix starts as the untied model's input embedding.

    Args:
        config: config of `small_config`.
        scheme (`str`): scheme of the twin.
        seed (`int`): seed of the initial weights.

    Returns:
        `tuple[PreTrainedModel, PreTrainedModel]`: the untied and the tied model.

    Raises:
        TyingError: the model cannot be built or trained on plain text, is too large, or cannot be tied in this way.
    """
    refuse_big(config, AutoModelForCausalLM)
    with refusing(config.model_type):
        set_seed(seed)
        untied = AutoModelForCausalLM.from_config(config)
        start_with_rows_of_unit_norm(untied.get_input_embeddings().weight)
        _try_out(untied)
    return untied, tie(copy.deepcopy(untied), scheme, init_from="target")


def differing_at_the_start(untied: PreTrainedModel, tied: PreTrainedModel) -> list[str]:
    """Find parameters of the tied model whose values differ from the untied model's. A fair comparison has none.

    Args:
        untied: untied model, before training.
        tied: tied model, before training.

    Returns:
        The names of these parameters.
    """
    values = dict(untied.named_parameters())
    # `named_parameters` lists the tied matrix under the name that comes first in the model.
    shared, embedding = (find_parameter(model, roles(model)["target"].name) for model in (tied, untied))
    return [
        name
        for name, value in tied.named_parameters()
        if not torch.equal(value, embedding if value is shared else values[name])
    ]


def start_with_rows_of_unit_norm(embedding: torch.nn.Parameter) -> None:
    """Draw an embedding from N(0, 1 / width) in place of N(0, 0.02^2), which makes every model of the demo better.

    From the first step on, AdamW moves every row of a softmax matrix by a full learning rate, also if its word does
    not occur, and all rows in similar directions. Small initial rows therefore soon become similar, and a tied model
    reads these rows as its input.

    Args:
        embedding: matrix, (words, width), in place.
    """
    torch.nn.init.normal_(embedding, std=embedding.shape[1] ** -0.5)


def _try_out(model: PreTrainedModel) -> None:
    """Run a forward and a backward pass on a copy, because some models cannot be trained on token ids alone."""
    tokens = torch.zeros((1, 4), dtype=torch.long)
    copy.deepcopy(model).train()(input_ids=tokens, labels=tokens).loss.backward()


def takes(config: PreTrainedConfig, name: str) -> bool:
    """Return whether a size can be set in a config, which then has a value for it and does not compute it.

    Args:
        config: config of a model type with its default values.
        name: name of the size.
    """
    computed = getattr(type(config), name, None)
    if isinstance(computed, property) and computed.fset is None:
        return False
    return getattr(config, name, None) is not None or (name == "head_dim" and hasattr(config, name))


def refuse_big(config: PreTrainedConfig, auto_class: type, script: str = "run_clm.py") -> None:
    """Refuse a config whose model is too large for a demo. The model is built on the meta device, without weights.

    Args:
        config: config of the model.
        auto_class: Auto class that makes the model.
        script: example script that the message recommends.

    Raises:
        TyingError: the model is too large, or cannot be built.
    """
    with refusing(config.model_type, script), torch.device("meta"):
        size = auto_class.from_config(config).num_parameters()
    if size > _MOST_PARAMETERS:
        raise TyingError(
            f"The smallest {config.model_type!r} that the demo can make has {size:,} parameters: expected at most "
            f"{_MOST_PARAMETERS:,}. Choose another type, or train it with examples/{script} and --config_overrides."
        )


@contextmanager
def refusing(model_type: str, script: str = "run_clm.py") -> Iterator[None]:
    """Convert any error of a model class about its sizes to a clear `TyingError`.

    Args:
        model_type: type of the model.
        script: example script that the message recommends.

    Raises:
        TyingError: the block raised an error.
    """
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise TyingError(
            f"The demo cannot train a small {model_type!r}, which asks for more than sizes and token ids ({reason}). "
            f"Choose another --model_type, or train it with examples/{script} and --config_overrides."
        ) from error
