"""The rows of a joint vocabulary in a model: matrices, biases, and the sizes in modules and configs."""

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingError
from ..ties.anatomy import Anatomy
from ..ties.slots import find_slot, fit_rows
from .joint import JointVocabulary

#: The number that is added to the logit of a word that only the source side has. exp(-100) is too small to change the
#: probabilities of the other words, and float16 and bfloat16 can represent the sum with the logit. -inf or a very
#: large number would not do. Label smoothing averages over all words: -inf makes this infinite or NaN, and with -1e4
#: the loss is mostly the mask. A label that is such a word costs 100.
MASK = -100.0

_SIZES = ("vocab_size", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size")


def joint_matrices(anatomy: Anatomy, joint: JointVocabulary) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Compute the values of each distinct matrix of the three roles for the joint vocabulary.

    A matrix keeps the rows of its own side's words. For the other words it takes the rows of the other side.

    Args:
        anatomy: the model, which is not changed.
        joint: ids of the joint vocabulary.

    Returns:
        Each parameter with its new values, (rows, D), in its own dtype.
    """
    source, target = (anatomy.slots[anatomy.roles[role].name].data for role in ("source", "target"))
    old, new = (torch.tensor(ids, device=source.device) for ids in zip(*sorted(joint.source_ids.items()), strict=True))
    matrices = {}
    for role, found in anatomy.roles.items():
        for parameter in (anatomy.slots[name] for name in found.names):
            if id(parameter) in matrices:
                continue
            own = parameter.data
            values = own.new_empty(joint.size, own.shape[1])
            if role == "source":
                values[: joint.target_size] = target.to(own)
                values[new.to(own.device)] = own[old.to(own.device)]
            else:
                values[: joint.target_size] = own
                values[joint.target_size :] = source[joint.source_only].to(own)
            matrices[id(parameter)] = (parameter, values)
    return list(matrices.values())


def masked_biases(
    anatomy: Anatomy, joint: JointVocabulary
) -> tuple[list[tuple[nn.Parameter, torch.Tensor]], list[tuple[nn.Module, str, torch.Tensor]]]:
    """Compute the biases that prevent the generation of words that only the source has.

    Args:
        anatomy: the model, which is not changed.
        joint: ids of the joint vocabulary.

    Returns:
        The parameters with their values, and the buffers as (module, name, values). Both are empty in a model that
        has no such bias.

    Raises:
        TyingError: the model has no such bias and no generation config either.
    """
    model = anatomy.model
    more = joint.size - joint.target_size
    buffers = [
        (module, name, nn.functional.pad(buffer, (0, more), value=MASK))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if name == "final_logits_bias" and buffer is not None
    ]
    output = anatomy.roles["output"].name.removesuffix("weight") + "bias"
    chains = [chain for chain in anatomy.without_roles(anatomy.declarable) if output in chain]
    held = {id(p): p for name in [output, *sum(chains, [])] if (p := anatomy.slots.get(name)) is not None}
    value = 0.0 if buffers else MASK
    biases = [(p, nn.functional.pad(p.data, (0, more), value=value)) for p in held.values()]
    if more and not biases and not buffers and getattr(model, "generation_config", None) is None:
        raise TyingError(
            f"{type(model).__name__} has no output bias and no generation_config: nothing can keep it from generating "
            "words of the source. Give it one: model.generation_config = GenerationConfig.from_model_config(config)."
        )
    return biases, buffers


def suppress_source_words(model: PreTrainedModel, joint: JointVocabulary) -> None:
    """Prevent the generation of words that only the source has by the generation config, in a model without a bias.

    Args:
        model: the model, in place.
        joint: ids of the joint vocabulary.
    """
    settings = model.generation_config
    masked = range(joint.target_size, joint.size)
    settings.suppress_tokens = sorted({*(settings.suppress_tokens or []), *masked})
    settings.renormalize_logits = True  # beams are then scored over the target's words alone


def write_sizes(anatomy: Anatomy, joint: JointVocabulary) -> None:
    """Write the new number of rows into all modules and configs that have it.

    Args:
        anatomy: the model, in place.
        joint: ids of the joint vocabulary.
    """
    model = anatomy.model
    for name in anatomy.role_of:
        fit_rows(find_slot(model, name)[0])
    parts = [model.config, *(m.config for m in model.modules() if isinstance(m, PreTrainedModel))]
    parts += [part for part in (getattr(model.config, name, None) for name in ("encoder", "decoder")) if part]
    for config in {id(config): config for config in parts}.values():
        for key in _SIZES:
            if key in vars(config):
                setattr(config, key, joint.size)
