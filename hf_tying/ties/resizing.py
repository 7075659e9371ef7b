"""Replace and resize embeddings of a tied model: every tied name follows, and every stated size."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..config import TyingError
from .anatomy import Anatomy, roles
from .groups import groups_held
from .relaxation import Relaxation
from .roles import TWO_SIZES
from .sharding import refuse_engine, refuse_in_parts, shape_of
from .slots import (
    find_parameter,
    find_slot,
    fit_rows,
    parameter_of,
    replace_module,
    same_values,
    share_parameter,
    slot_of,
    untie_others,
)

logger = logging.get_logger(__name__)


def replace_tied(model: PreTrainedModel, old: nn.Module | None, new: nn.Module) -> bool:
    """Replace the module `old` by `new`, and put the matrix of `new` under every name that was tied to that of `old`.

    Modules are never shared: an embedding may carry a scale or a padding index of its own.

    Returns:
        Whether `old` was tied; if not, nothing is done.

    Raises:
        TyingError: when `new` has no matrix.
    """
    parameter = getattr(old, "weight", None)
    group = next((g for g in groups_held(model) if any(find_parameter(model, n) is parameter for n in g.names)), None)
    if group is None or old is None or parameter is None:
        return False
    weight = getattr(new, "weight", None)
    if not isinstance(weight, nn.Parameter) or len(shape_of(weight)) != 2:
        raise TyingError(
            f"The embedding is tied as group {group.name!r} ({', '.join(group.names)}): expected a module with a "
            f"matrix `weight`, found {type(new).__name__}. Call untie(model) first to replace one side alone."
        )
    refuse_in_parts(model, "replace the embedding of", gathers=True)
    replace_module(model, old, new)
    share_parameter(model, group.names, weight)
    fit_tied(model)
    if shape_of(weight)[0] != shape_of(parameter)[0]:
        model.config.get_text_config().vocab_size = shape_of(weight)[0]
        _fit_vocab_size(model)
    logger.warning(
        f"The embedding of group {group.name!r} is replaced under each of its names: {', '.join(group.names)}. An "
        "optimizer made before holds the old matrix: make it again."
    )
    return True


def refuse_relaxed(old: nn.Module | None, new: nn.Module | None) -> None:
    """Refuse to replace a relaxed embedding.

    Raises:
        TyingError: the new module would drop the difference.
    """
    if old is None or new is old:
        return
    if any(isinstance(child, Relaxation) and child.active for child in old.children()):
        raise TyingError(
            "The embedding is relaxed, and a new module would drop its difference: harden(model) or untie(model) "
            "first."
        )


def refuse_other_values(model: PreTrainedModel, old: nn.Module | None, new: nn.Module | None) -> None:
    """Refuse to replace `old`, a tied output embedding, by a module with other values.

    Raises:
        TyingError: when `old` is tied and `new` has another matrix, or is relaxed.
    """
    refuse_relaxed(old, new)
    matrix, weight = getattr(old, "weight", None), getattr(new, "weight", None)
    group = next((g for g in groups_held(model) if any(find_parameter(model, n) is matrix for n in g.names)), None)
    if matrix is None or group is None or weight is matrix or vars(model).get("_is_resized", False):
        return
    if weight is None or not same_values(weight, matrix):
        raise TyingError(
            f"The output embedding is tied as group {group.name!r} ({', '.join(group.names)}), and the new one has "
            "other values, which would be those of every name. To replace the output alone: untie(model) first. To "
            "replace all: model.set_input_embeddings(...)."
        )


def follow_bias(model: PreTrainedModel, new: nn.Module) -> None:
    """Give the bias of a new output module to the names tied to it, such as the second one of RoBERTa."""
    bias = new._parameters.get("bias")
    for group in groups_held(model):
        slots = [find_slot(model, name) for name in group.names]
        if bias is not None and any(slot == (new, "bias") for slot in slots):
            share_parameter(model, group.names, bias)


def refuse_new_rows(model: PreTrainedModel, new_num_tokens: int | None, pad_to_multiple_of: int | None) -> None:
    """Refuse another number of rows in a model that is split over processes, or that an engine of ZeRO-3 has taken.

    Raises:
        TyingError: for such a model, with the way out. One whose rows stay as they are is left alone.
    """
    weight = getattr(model.get_input_embeddings(), "weight", None)
    rows = shape_of(weight)[0] if isinstance(weight, torch.Tensor) else None
    wanted = rows if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of and wanted:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != rows:
        refuse_in_parts(model, "resize", gathers=True)
        refuse_engine(model, "resize the embeddings of")


def resize(
    model: PreTrainedModel,
    stock_resize: Callable,
    new_num_tokens: int | None,
    pad_to_multiple_of: int | None,
    mean_resizing: bool,
) -> nn.Embedding:
    """Run the stock resize, and resize what it leaves out: untied embeddings, and sizes stated beside a tied matrix.

    Matrices are resized in place (`parameter.data`), so that a tie survives by itself and the optimizer keeps it.

    Raises:
        TyingError: when an embedding is tied to something that has no row for each word, or the model has two
            vocabularies.
    """
    embeddings: Any = model.get_input_embeddings()
    if not isinstance(getattr(embeddings, "weight", None), torch.Tensor):
        # Bark has a list of embeddings, which its class resizes in place, so ties stay.
        embeddings = _narrowed(stock_resize)(new_num_tokens, pad_to_multiple_of, mean_resizing)
        fit_tied(model)
        return embeddings
    own_resize = _own_resize(model)
    rows = shape_of(embeddings.weight)[0]
    changes = new_num_tokens is not None or pad_to_multiple_of is not None
    if changes:
        _refuse_other_rows(model)
    others = _embeddings_out_of_reach(model, rows) if changes and own_resize is None else []
    before = [(module, module.weight.data) for module in others]
    vars(model)["_is_resized"] = True  # the setters of the architecture get matrices of the new size
    try:
        for module in others:
            model._get_resized_embeddings(module, new_num_tokens, pad_to_multiple_of, mean_resizing)
        embeddings = (own_resize or _narrowed(stock_resize))(new_num_tokens, pad_to_multiple_of, mean_resizing)
    except Exception:
        for module, weight in before:  # all or nothing, if the architecture refuses
            module.weight.data = weight
            fit_rows(module)
        raise
    finally:
        del vars(model)["_is_resized"]
    untie_others(model, groups_held(model))  # BERT's setter always makes its two output biases one
    fit_tied(model)
    _fit_idle_biases(model, rows, shape_of(embeddings.weight)[0])
    _fit_final_bias(model)
    _fit_vocab_size(model)
    return embeddings


def _narrowed(stock_resize: Callable) -> Callable:
    """Adapt `stock_resize` to three arguments: MobileBERT and much custom code take fewer.

    An argument that is given and not taken is an error, as it is without this package.
    """
    parameters = inspect.signature(stock_resize).parameters
    takes_all = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())

    def resized(new_num_tokens: int | None, pad_to_multiple_of: int | None, mean_resizing: bool) -> nn.Embedding:
        given = {"new_num_tokens": new_num_tokens, "pad_to_multiple_of": pad_to_multiple_of}
        given["mean_resizing"] = mean_resizing
        defaults = {"pad_to_multiple_of": None, "mean_resizing": True}
        kept = {k: v for k, v in given.items() if takes_all or k in parameters or defaults.get(k, v) is not v}
        first = next(iter(parameters)) if not takes_all and "new_num_tokens" not in parameters else "new_num_tokens"
        return stock_resize(**{first: kept.pop("new_num_tokens")}, **kept)

    return resized


def fit_tied(model: nn.Module) -> None:
    """Update the sizes that modules state beside a tied matrix to its rows."""
    for group in groups_held(model):
        for name in group.names:
            module, attribute = slot_of(model, name)
            if attribute == "weight" and isinstance(module.weight, nn.Parameter):
                fit_rows(module)
    if isinstance(model, PreTrainedModel):
        _fit_two_sizes(model)


def _refuse_other_rows(model: PreTrainedModel) -> None:
    anatomy = Anatomy(model)
    vocabulary = {*anatomy.role_of, *(name for chain in anatomy.beside_roles(anatomy.declarable) for name in chain)}
    for group in groups_held(model):
        words = [name for name in group.names if name in anatomy.role_of]
        others = [name for name in group.names if name not in vocabulary]
        if words and others:
            raise TyingError(
                f"Cannot resize: {others[0]!r} is tied to the embedding {words[0]!r} (group {group.name!r}), and is "
                f"not a vocabulary matrix. untie(model, {others}) first."
            )


def _own_resize(model: PreTrainedModel) -> Callable | None:
    """The replacement of a stock resize that refuses (`EncoderDecoderModel`) or knows one side only; else `None`."""
    model_type = getattr(model.config, "model_type", None)
    if model_type == "encoder-decoder":
        return partial(_resize_parts, model)
    if model_type in TWO_SIZES and _is_one_vocabulary(model):
        return partial(_resize_all, model)
    return None


def _is_one_vocabulary(model: PreTrainedModel) -> bool:
    """Whether source and target have the same vocabulary, as far as the model itself can tell.

    Raises:
        TyingError: for FSMT with two sizes: its only resize would give one side the other's size.
    """
    found = roles(model)
    pair = {found[role].name for role in ("source", "target") if role in found}
    if any(pair <= set(group.names) for group in groups_held(model)):
        return True
    if model.config.model_type != "fsmt":
        return getattr(model.config, "share_encoder_decoder_embeddings", True)
    if len({shape_of(parameter_of(model, name))[0] for name in pair}) > 1:
        raise TyingError(
            f"Cannot resize {type(model).__name__}: it has two vocabularies, of {model.config.src_vocab_size} and "
            f"{model.config.tgt_vocab_size} words, and one resize. Join them first: "
            "hf_tying.data.join_vocabularies(model, source_tokenizer, target_tokenizer)."
        )
    return True


def _resize_all(
    model: PreTrainedModel, new_num_tokens: int | None, pad_to_multiple_of: int | None, mean_resizing: bool
) -> nn.Embedding:
    """Resize source, target and output of one vocabulary, where the stock one knows one side only (Marian, FSMT)."""
    for role in roles(model).values():
        for name in role.names:
            module = slot_of(model, name)[0]
            if isinstance(module, nn.Embedding):
                model._get_resized_embeddings(module, new_num_tokens, pad_to_multiple_of, mean_resizing)
                new_num_tokens, pad_to_multiple_of = shape_of(module.weight)[0], None
            else:
                head: Any = module
                resized = model._get_resized_lm_head(head, new_num_tokens, mean_resizing=mean_resizing)
                head.weight.data = resized.weight.data
                fit_rows(head)
            for group in groups_held(model):
                if name in group.names:  # under ZeRO-3 it is another parameter now
                    share_parameter(model, group.names, parameter_of(model, name))
    _fit_two_sizes(model)
    model.tie_weights()
    embeddings: Any = model.get_input_embeddings()
    model.vocab_size = shape_of(embeddings.weight)[0]  # the stock resize sets it on every class
    return embeddings


def _resize_parts(model: Any, *how: Any) -> nn.Embedding:
    """Resize encoder and decoder each by its own method; the stock class refuses, since they may differ."""
    source, target = (part.get_input_embeddings().weight for part in (model.encoder, model.decoder))
    if shape_of(source)[0] != shape_of(target)[0]:
        raise TyingError(
            f"Cannot resize {type(model).__name__}: it has two vocabularies, of {shape_of(source)[0]} and "
            f"{shape_of(target)[0]} rows. Resize each side: model.encoder.resize_token_embeddings(...), "
            "model.decoder.resize_token_embeddings(...); or join them first by hf_tying.data.join_vocabularies."
        )
    model.decoder.resize_token_embeddings(*how)  # with its output and bias
    model.encoder.resize_token_embeddings(*how)
    if getattr(model.config, "vocab_size", None) is not None:
        model.config.vocab_size = model.decoder.config.vocab_size
    return model.get_input_embeddings()


def _fit_two_sizes(model: PreTrainedModel) -> None:
    """Update the two sizes in a config that states one for each side."""
    found = roles(model) if model.config.model_type in TWO_SIZES else {}
    if "target" not in found:  # an encoder alone shares the config of the whole model
        return
    for role, key in zip(("source", "target"), TWO_SIZES[model.config.model_type], strict=True):
        if role in found:  # a decoder alone has no source
            setattr(model.config, key, shape_of(parameter_of(model, found[role].name))[0])


def _embeddings_out_of_reach(model: PreTrainedModel, rows: int) -> list[nn.Embedding]:
    """Input embeddings over the same vocabulary that the stock resize would replace or forget, each matrix once.

    Not the decoder's where it has a vocabulary of its own: Marian resizes that by `resize_decoder_token_embeddings`.
    """
    shared = getattr(model.config, "share_encoder_decoder_embeddings", True)
    sides = ("source", "target") if shared else ("source",)
    names = [name for side, role in roles(model).items() if side in sides for name in role.names]
    modules = [find_slot(model, name)[0] for name in names]
    found = {id(m.weight): m for m in modules if isinstance(m, nn.Embedding) and shape_of(m.weight)[0] == rows}
    found.pop(id(model.get_input_embeddings().weight), None)
    return list(found.values())


def _fit_idle_biases(model: PreTrainedModel, before: int, after: int) -> None:
    """Resize both copies of an output bias that the architecture keeps twice (BERT), also where they are not tied."""
    anatomy = Anatomy(model)
    for names in anatomy.without_roles(anatomy.declarable):
        parameters = [find_parameter(model, name) for name in names]
        if {parameter.shape for parameter in parameters} == {(before,), (after,)}:
            for parameter in parameters:
                parameter.data = nn.functional.pad(parameter.data, (0, after - parameter.shape[0]))


def _fit_vocab_size(model: PreTrainedModel) -> None:
    """Update the attribute `vocab_size`, which many classes have beside the config."""
    if isinstance(vars(model).get("vocab_size"), int):
        model.vocab_size = model.config.get_text_config().vocab_size


def _fit_final_bias(model: PreTrainedModel) -> None:
    """Give `final_logits_bias` the padded size: Marian gives it the size that was asked for."""
    bias, output = getattr(model, "final_logits_bias", None), model.get_output_embeddings()
    if isinstance(bias, torch.Tensor) and output is not None and bias.shape[-1] != shape_of(output.weight)[0]:
        model._resize_final_logits_bias(shape_of(output.weight)[0])  # pyright: ignore[reportCallIssue]
