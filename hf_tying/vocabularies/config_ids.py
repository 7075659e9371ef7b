"""The special ids of the source side in a config, above all padding, and their ids in a joint vocabulary."""

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..config import TyingError
from ..ties.anatomy import Anatomy
from ..ties.slots import find_slot
from ..ties.vocabulary import vocabularies_of
from .joint import JointVocabulary


def padding_move(
    anatomy: Anatomy, joint: JointVocabulary, target_tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int] | None:
    """Find the padding id of the source side before and after the join.

    Args:
        anatomy: the model.
        joint: ids of the joint vocabulary.
        target_tokenizer: tokenizer of the target side.

    Returns:
        The two ids, or `None` if the id does not change.

    Raises:
        TyingError: the id would change, and one config has it for both sides with two padding tokens, or the model
            counts positions from it.
    """
    model = anatomy.model
    config = _source_config(model)
    before = config.pad_token_id
    after = joint.source_ids.get(before, before)
    if before is None or after == before:
        return None
    pad = target_tokenizer.special_tokens_map.get("pad_token")
    if config is model.config and after != vocabularies_of(target_tokenizer)[1].get(pad):
        raise TyingError(
            f"{type(config).__name__} has one padding id for both sides, {before}: the source's {before} becomes "
            f"{after}, which is not the target's padding token {pad!r}. Expected padding "
            "tokens that are spelled alike, or only pad on both sides."
        )
    of_words = {find_slot(model, name)[0] for name in anatomy.role_of}
    counting = _source_model(model)
    for name, module in counting.named_modules():
        table = isinstance(module, nn.Embedding) or hasattr(module, "embedding_dim")
        if table and module not in of_words and getattr(module, "padding_idx", None) is not None:
            raise TyingError(
                f"{type(counting).__name__} counts positions from the padding id ({name!r}): it is {before}, and "
                f"would become {after}. Expected the id to stay: use a target tokenizer whose padding token has "
                f"the id {before}."
            )
    return before, after


def write_source_ids(model: PreTrainedModel, joint: JointVocabulary, padding: tuple[int, int] | None) -> None:
    """Write the joint ids of the source's special tokens into its config, and its padding id into its modules.

    Args:
        model: the model, in place.
        joint: ids of the joint vocabulary.
        padding: the ids before and after, from `padding_move`.
    """
    config = _source_config(model)
    if config is not model.config:
        for key, value in config.to_dict().items():
            if key.endswith("_token_id") and isinstance(value, int):
                setattr(config, key, joint.source_ids.get(value, value))
    if padding is None:
        return
    before, after = padding
    if config is model.config:
        config.pad_token_id = after
        if getattr(model, "generation_config", None) is not None and model.generation_config.pad_token_id == before:
            model.generation_config.pad_token_id = after
    for module in _source_model(model).modules():
        if vars(module).get("padding_idx") == before:
            module.padding_idx = after


def _source_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config with the ids of the source side: the encoder's own if it has one, else the model's."""
    config = getattr(model.config, "encoder", None)
    return config if isinstance(config, PreTrainedConfig) else model.config


def _source_model(model: PreTrainedModel) -> nn.Module:
    """The part of the model that reads its ids from the source config."""
    return model if _source_config(model) is model.config else model.get_encoder()
