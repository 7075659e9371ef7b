"""The layers of any model in their order, from the embeddings up to the head: what is frozen, or has a rate, together.

Source: Howard & Ruder 2018 sections 3.2 and 3.3.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingConfig, TyingError
from ..ties.anatomy import Anatomy
from ..ties.depth_groups import depth_groups
from ..ties.sharding import gathered, shape_of
from ..ties.shared_layers import located_stacks
from ..ties.slots import named_slots
from ..ties.verify import unwrapped

#: Names of the lowest group and of the highest one.
BOTTOM, HEAD = "embeddings", "head"


def layer_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Find the layers of a model, the lowest first.

    The layers are the repeated blocks of the base model (`base_model_prefix`): each element of its outermost
    `nn.ModuleList`s. Parameters before the first block, and embeddings outside of the blocks, are the lowest group
    (`"embeddings"`). Parameters after the last block (a final norm, a pooler), and all parameters outside of the base
    model, are the highest group (`"head"`). Others belong to the block before them. A tied matrix is in the highest
    group of all its names, so the embedding of a tied language model belongs to its head, as in the released code of
    ULMFiT. A model without blocks has two groups.

    Args:
        model: any `PreTrainedModel`, also wrapped, on any device.

    Returns:
        The parameters of each group, each parameter once. Blocks are named by their place in the model. Groups
        without a parameter are left out.

    Example:
        >>> list(layer_groups(classifier))
        ['embeddings', 'lstm.layers.0', 'lstm.layers.1', 'head']
    """
    inner = unwrapped(model)
    prefix = "" if inner.base_model is inner else f"{inner.base_model_prefix}."
    blocks = [f"{prefix}{name}" for name in block_names(inner.base_model)]
    names = [BOTTOM, *blocks, HEAD]
    owners = {id(p): module for module in inner.modules() for p in module._parameters.values()}
    level: dict[int, int] = {}
    parameters: dict[int, nn.Parameter] = {}
    reached = 0
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        inside = next((i for i, block in enumerate(blocks, 1) if name.startswith(f"{block}.")), None)
        if inside is not None:
            reached = place = inside
        elif not name.startswith(prefix):
            place = len(blocks) + 1
        elif isinstance(owners[id(parameter)], nn.Embedding) or not reached:
            place = 0
        else:
            place = reached if reached < len(blocks) else len(blocks) + 1
        level[id(parameter)] = max(place, level.get(id(parameter), 0))
        parameters[id(parameter)] = parameter
    groups = {name: [parameters[key] for key, at in level.items() if at == i] for i, name in enumerate(names)}
    return {name: members for name, members in groups.items() if members}


def discriminative_parameters(
    model: nn.Module, learning_rate: float, factor: float = 2.6, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Make the parameter groups of an optimizer, with a lower learning rate for each lower layer.

    Args:
        model: any `PreTrainedModel`, also wrapped.
        learning_rate: rate of the highest group.
        factor: quotient of the rates of two neighbouring groups. Default 2.6, as in the paper; 1 gives all the same.
        weight_decay: weight decay of matrices. Vectors (biases, norms) have none. Default 0.

    Returns:
        Groups for any `torch.optim` optimizer, from the highest layer to the lowest. Frozen parameters are left out.

    Raises:
        TyingError: if the rate or the factor is not positive, or no parameter is trained.

    Source: Howard & Ruder 2018 section 3.2, discriminative fine-tuning.

    Example:
        >>> optimizer = torch.optim.AdamW(discriminative_parameters(model, 1e-3), betas=(0.7, 0.99))
        >>> Trainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()
    """
    if not (learning_rate > 0 and factor > 0):
        raise TyingError(f"learning_rate={learning_rate}, factor={factor}: expected numbers above 0.")
    rates = [(learning_rate / factor**i, each) for i, each in enumerate(reversed(layer_groups(model).values()))]
    return _with_decay(model, rates, weight_decay)


def shared_layer_parameters(
    model: nn.Module, learning_rate: float, power: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Make the parameter groups of an optimizer, with a lower learning rate for a block of more visits.

    A parameter in N layers has the rate `learning_rate / N**power`: its gradient is the sum over N visits, and a step
    changes the function in N places. Wang et al. 2026 (On the Residual Scaling of Looped Transformers) put the factor
    1/N into the residual instead (`share_layers(..., residual_factor="looped")`), and find that the best rate then
    does not depend on N: use one of the two.

    Args:
        model: any `PreTrainedModel`, also wrapped, whose layers are shared by `share_layers`.
        learning_rate: rate of parameters of one layer, and outside of layers.
        power: of the number of visits. Default 1, the mean over the visits under SGD; 0.5 where they are independent;
            0 gives all the same.
        weight_decay: weight decay of matrices. Vectors (biases, norms) have none. Default 0.

    Returns:
        Groups for any `torch.optim` optimizer, fewest visits first. Frozen parameters are left out.

    Raises:
        TyingError: if the rate is not positive or the power is negative, or no parameter is trained.

    Example:
        >>> optimizer = torch.optim.AdamW(shared_layer_parameters(model, 1e-3))
    """
    if not (learning_rate > 0 and power >= 0):
        raise TyingError(f"learning_rate={learning_rate}, power={power}: expected a rate above 0, a power from 0.")
    inner = unwrapped(model)
    slots = named_slots(inner)
    visits: dict[int, int] = {}
    depth = TyingConfig.in_config(inner.config)
    anatomy = Anatomy(inner)
    for stack in located_stacks(anatomy, depth, strict=False) if depth.depth else ():
        for root, names in depth_groups(anatomy.own_slots, stack).items():
            visits[id(slots[root])] = len(names)
    members: dict[int, list[nn.Parameter]] = {}
    for parameter in inner.parameters():
        members.setdefault(visits.get(id(parameter), 1), []).append(parameter)
    rates = [(learning_rate / count**power, members[count]) for count in sorted(members)]
    return _with_decay(model, rates, weight_decay)


def _with_decay(
    model: nn.Module, rates: list[tuple[float, list[nn.Parameter]]], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of an optimizer: trained matrices with weight decay, trained vectors without."""
    groups = []
    for rate, members in rates:
        trained = [p for p in members if p.requires_grad]
        for kind, decay in (
            ([p for p in trained if len(shape_of(p)) > 1], weight_decay),
            ([p for p in trained if len(shape_of(p)) < 2], 0),
        ):
            if kind:
                groups.append({"params": kind, "lr": rate, "weight_decay": decay})
    if not groups:
        raise TyingError(f"No parameter of {type(model).__name__} is trained: expected some with requires_grad.")
    return groups


@torch.no_grad()
def restart(model: PreTrainedModel, parameters: list[nn.Parameter]) -> None:
    """Draw initial values for some parameters anew, as the model's class draws them.

    A module is initialised if all of its parameters are among them, so a matrix that is tied to another layer keeps
    its values.

    Args:
        model: model, in place.
        parameters: parameters of whole layers.
    """
    chosen = {id(p) for p in parameters}

    def draw(module: nn.Module, owner: PreTrainedModel) -> None:
        owner = module if isinstance(module, PreTrainedModel) else owner
        for child in module.children():
            draw(child, owner)
        own = list(module.parameters())
        if own and all(id(p) in chosen for p in own):
            for parameter in own:  # a parameter of a file is marked, so that it is not drawn
                vars(parameter).pop("_is_hf_initialized", None)
            with gathered(own, write=True):
                owner._init_weights(module)

    draw(model, model)


def block_names(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """The names of the elements of the outermost lists of blocks."""
    for name, child in module.named_children():
        if _is_stack(child):
            yield from (f"{prefix}{name}.{number}" for number in range(len(child)))
        else:
            yield from block_names(child, f"{prefix}{name}.")


def _is_stack(module: nn.Module) -> bool:
    members = list(module.children()) if isinstance(module, nn.ModuleList | nn.Sequential) else []
    if not members or any(isinstance(member, nn.Embedding) or not list(member.parameters()) for member in members):
        return False
    return isinstance(module, nn.ModuleList) or (len(members) > 1 and len({type(member) for member in members}) == 1)
