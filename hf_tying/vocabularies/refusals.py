"""The refusals of `join_vocabularies`: matrices and tokenizers that cannot become one."""

from typing import TYPE_CHECKING

from ..config import TyingError
from ..ties.anatomy import Anatomy
from ..ties.sharding import shape_of
from ..ties.slots import find_slot, why_no_parameter
from ..ties.vocabulary import vocabularies_of
from .joint import VocabularySide

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def refuse_missing_matrices(anatomy: Anatomy) -> None:
    """Refuse a model that lacks a matrix of floating-point values, with a row for each word, for one of the roles.

    Args:
        anatomy: the model.

    Raises:
        TyingError: a role is missing, or its matrix has no values that can be joined.
    """
    model = anatomy.model
    missing = [role for role in ("source", "target", "output") if role not in anatomy.roles]
    if missing:
        raise TyingError(
            f"{type(model).__name__} has no {' and no '.join(missing)} embedding: expected an encoder-decoder model "
            "with a language modelling head."
        )
    for name in anatomy.role_of:
        parameter, module = anatomy.slots.get(name), find_slot(model, name)[0]
        if parameter is None:
            raise TyingError(f"Cannot join the vocabularies: {name!r} {why_no_parameter(model, name)}.")
        if not parameter.is_floating_point() or "quant" in type(module).__module__:
            raise TyingError(
                f"Cannot join the vocabularies: {name!r} is quantised ({type(module).__name__}, {parameter.dtype}). "
                "Join before quantising."
            )
        if parameter.is_meta:
            raise TyingError(
                f"Cannot join the vocabularies: {name!r} is on the meta device and has no value. Load the weights "
                "first."
            )
        if parameter.ndim != 2:
            raise TyingError(
                f"Cannot join the vocabularies: {name!r} has shape {tuple(parameter.shape)}, expected a row for each "
                "word. The encoder of this model reads no text."
            )


def refuse_unjoinable_matrices(anatomy: Anatomy) -> None:
    """Refuse source and target matrices that are one, have different widths, or are tied to anything else.

    Args:
        anatomy: the model.

    Raises:
        TyingError: one of these holds.
    """
    names = {role: found.name for role, found in anatomy.roles.items()}
    held = {role: anatomy.slots[name] for role, name in names.items()}
    if held["source"] is held["target"] or held["source"] is held["output"]:
        raise TyingError(
            f"The vocabularies of source and target differ, but {names['source']!r} and the target's matrix are "
            "one parameter: every row would stand for two words. Expected two matrices. If the model was trained with "
            "these two tokenizers all the same, untie(model) first; else give both sides the tokenizer that it was "
            "trained with."
        )
    source, target, output = (tuple(held[role].shape) for role in ("source", "target", "output"))
    if source[1] != target[1] or target != output:
        raise TyingError(
            f"Cannot join the vocabularies: {names['source']!r} is {source}, {names['target']!r} {target}, "
            f"{names['output']!r} {output}. Expected one width for all, and as many rows in the last two: rows of "
            "different width cannot be in one matrix."
        )
    known = anatomy.role_of.keys()
    for chain in anatomy.tied:
        if known & set(chain) and set(chain) - known:
            other = min(set(chain) - known)
            raise TyingError(
                f"Cannot join the vocabularies: {other!r} is tied to {min(known & set(chain))!r}, and is not a "
                f"vocabulary matrix. untie(model, [{other!r}]) first."
            )


def refuse_two_ends(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer with two vocabularies whose end tokens have different ids.

    Such a tokenizer (Marian, FSMT) ends texts of both sides with the id of the source's end token.

    Args:
        tokenizer: tokenizer of the target side.

    Raises:
        TyingError: the two ids differ.
    """
    end = tokenizer.special_tokens_map.get("eos_token") or tokenizer.special_tokens_map.get("sep_token")
    ids = [vocabulary.get(end) for vocabulary in vocabularies_of(tokenizer)]
    if ids[0] != ids[1]:
        raise TyingError(
            f"{type(tokenizer).__name__} ends the text of both sides with id {ids[0]}, but its target vocabulary has "
            f"the end of a text at {ids[1]}: the model has learnt a wrong word as the end. Expected one id for both."
        )


def refuse_missing_rows(anatomy: Anatomy, role: str, side: VocabularySide) -> None:
    """Refuse a tokenizer with words that have no row in the matrix of their role.

    Args:
        anatomy: the model.
        role: `"source"` or `"target"`.
        side: vocabulary of this side.

    Raises:
        TyingError: a word has no row.
    """
    name = anatomy.roles[role].name
    rows = shape_of(anatomy.slots[name])[0]
    last = max(side.words, default=rows)
    if last >= rows:
        raise TyingError(
            f"The {role} tokenizer has {len(side.words)} words up to id {last}, the matrix "
            f"{name!r} {rows} rows: expected a row for each word. Give the tokenizer that the "
            "model was trained with, or resize the model to it first."
        )
