"""The tensors of a model's file: every name of a group, or its root alone; relaxed names with their whole values."""

import torch
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingError
from .checkpoint import check_loaded_state
from .groups import groups_held
from .relaxation import relaxation_at
from .relaxed_values import relaxed_value
from .sharding import is_dtensor, is_partitioned, stock_name
from .slots import state_key


def file_state(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None, save_format: str | None, writes: bool = True
) -> dict[str, torch.Tensor]:
    """The tensors that `save_pretrained` is to write, each with memory of its own where it is written again.

    Args:
        model: model with `tie_groups`.
        state_dict: state dict to write. Default `None`: that of the model.
        save_format: `"portable"` for every name of a group, `"dedup"` for its root.
        writes: whether this process writes a file. ZeRO-3 gives the others no values.

    Raises:
        TyingError: names of a group have different values, or a value is offloaded or a part of one.
    """
    if state_dict is None and any(map(is_partitioned, model.parameters())):
        if not writes:
            return model.state_dict()
        raise TyingError(
            f"Cannot save {stock_name(model)}: DeepSpeed ZeRO-3 has partitioned its parameters, and a file would have "
            "none of their values. Give them, from all processes: model.save_pretrained(folder, "
            "is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(engine))."
        )
    state = dict(model.state_dict() if state_dict is None else state_dict)
    if any(map(is_dtensor, state.values())) and getattr(model.config, "distributed_config", None) is None:
        raise TyingError(
            f"Cannot save {stock_name(model)}: FSDP2 has split its parameters, and transformers gathers none that it "
            "has not split itself. Give whole ones, from all processes: model.save_pretrained(folder, "
            "is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model))."
        )
    check_loaded_state(model, state, "", action="save")
    given = dict(state)
    for group in groups_held(model):
        keys = [key for name in group.names if (key := state_key(model, name)) in state]
        if not keys:
            continue
        kept = state[keys[0]]
        if kept.is_meta and not hasattr(model, "hf_device_map"):
            raise TyingError(
                f"Cannot save {keys[0]!r}: its value is offloaded (accelerate.cpu_offload or disk_offload). "
                "Bring it back by accelerate.hooks.remove_hook_from_submodules(model) and model.tie_weights(), "
                "then save."
            )
        # A quantised matrix lies under several keys (bitsandbytes: `weight`, `weight.absmax`, ...).
        parts = {part.removeprefix(keys[0]): state[part] for part in state if part.startswith(f"{keys[0]}.")}
        for key in [key for key in state if any(key == k or key.startswith(f"{k}.") for k in keys)]:
            del state[key]
        for name in group.names if save_format == "portable" else (group.root,):
            first = name == group.root
            for part, value in {"": kept, **parts}.items():
                if relaxation_at(model, name) is not None and not value.is_meta:
                    state[state_key(model, name) + part] = relaxed_value(model, name, value, given)
                    continue
                shared = first or not isinstance(value, torch.Tensor) or value.is_meta
                state[state_key(model, name) + part] = value if shared else value.clone()
    return state
