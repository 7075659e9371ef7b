"""`export_to_lora`: exact conversion of a Tied-LoRA adapter to an ordinary LoRA adapter."""

import os
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from transformers.modeling_utils import unwrap_model

from ..report.layer_order import in_layer_order
from ..ties.relaxation import relaxed_names
from ..ties.sharding import whole
from .adapter_folder import read_adapter, type_of_adapter, write_adapter
from .config import TiedLoraConfig, TiedPeftType, is_tied_lora
from .layer import TiedLoraLayer
from .matrices import scale_rows
from .relaxed import export_relaxed
from .sharing import FactorNames
from .tensor_names import BASE_PREFIX, names_in_model, state_from_file

#: The subfolder into which `push_to_hub(also_lora=True)` puts the tied form.
TIED_FOLDER = "tied_lora"


def export_to_lora(
    model_or_path: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    adapter_name: str = "default",
    subfolder: str | None = None,
    **hub: Any,
) -> Path:
    """Write a Tied-LoRA adapter as a LoRA adapter, which stock PEFT and all other readers of LoRA can load.

    The update of each module is a product of two matrices. The scaling, u and v are multiplied into them:

        alpha / r * diag(v) B diag(u) A = lora_B lora_A  with  lora_A = alpha / r * diag(u) A,  lora_B = diag(v) B

    Nothing is approximated. The LoRA has the same r, and `lora_alpha = r`. A factor that was stored once is now stored
    for each module, so the file is larger by a factor of about the number of layers. The dtypes are kept. The products
    are computed in float32, or in float64 for factors of that dtype.

    A model with relaxed ties of the kind `"lora"` (`TyingConfig.groups`) and without an adapter is exported by the
    differences of its relaxed members. The base model of that adapter is the exactly tied one, `harden(model)`.

    The export also has the fully trained modules (`modules_to_save`), the biases, the task and the name of the base
    model.

    Args:
        model_or_path: a `PeftModel`; a transformers model with an adapter of its own (`add_adapter`, `load_adapter`);
            or the folder or Hub id of a saved adapter, for which no base model is loaded.
        out: folder for `adapter_config.json` and `adapter_model.safetensors`. It is made if it does not exist. On an
            error, nothing in it is changed.
        adapter_name: name of the adapter in a model. Default: `"default"`, as in PEFT, which saves any other adapter
            into a subfolder of its name.
        subfolder: subfolder of a path that has the adapter. Default: none.
        **hub: arguments for a Hub id: `revision`, `token`, `cache_dir`, ...

    Returns:
        `out`.

    Raises:
        ValueError: there is no Tied-LoRA adapter; it is merged; its weights are on the meta device; or `out` already
            has a Tied-LoRA adapter.
        RuntimeError: a file's tensors do not fit its settings.
    """
    if isinstance(model_or_path, nn.Module):
        if subfolder or hub:
            raise ValueError(f"{', '.join(['subfolder'] * bool(subfolder) + list(hub))}: only of a path, not a model.")
        model_or_path = unwrap_model(model_or_path)  # DistributedDataParallel
        if relaxed_names(model_or_path) and not hasattr(model_or_path, "peft_config"):
            return export_relaxed(model_or_path, out)
        config, state = _of_model(model_or_path, adapter_name)
    else:
        if adapter_name != "default":
            raise ValueError(
                f"adapter_name={adapter_name!r}: a saved adapter has no name. Expected "
                f"subfolder={adapter_name!r}, where PEFT saves an adapter of that name."
            )
        config, state = read_tied_adapter(model_or_path, subfolder, **hub)
    if type_of_adapter(out) == TiedPeftType.TIED_LORA:
        raise ValueError(f"{out} has a Tied-LoRA adapter, which the export would replace. Give another folder.")
    return write_adapter(lora_config(config), lora_tensors(state, config), out)


def read_tied_adapter(
    path: str | os.PathLike[str], subfolder: str | None = None, **hub: Any
) -> tuple[TiedLoraConfig, dict[str, torch.Tensor]]:
    """Read the settings of a saved Tied-LoRA adapter, and its tensors by their names in a model.

    Args:
        path: folder, or id on the Hub.
        subfolder: subfolder of `path` that has the adapter. Default: none.
        **hub: arguments for the Hub: `revision`, `token`, `cache_dir`, ...

    Returns:
        The config, and the tensors by their names in a model.

    Raises:
        ValueError: the adapter is of another type, or its files are missing or broken.
        RuntimeError: the tensors do not fit the settings.
    """
    config, saved = read_adapter(path, subfolder, **hub)
    place = os.path.join(os.fspath(path), subfolder or "")
    _check_type(config, place)
    return config, state_from_file(saved, config)


def lora_config(config: TiedLoraConfig) -> LoraConfig:
    """Make the settings of the LoRA adapter with the same update.

    Args:
        config: settings of the Tied-LoRA adapter, with `adapted_modules`.
    """
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.r,
        lora_dropout=config.dropout,
        bias="lora_only" if config.bias == "tied_lora_only" else config.bias,
        fan_in_fan_out=config.fan_in_fan_out,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        auto_mapping=config.auto_mapping,
        inference_mode=True,
    )
    # Full names, because a pattern or a choice of layers has been resolved by now. They are set afterwards, because
    # PEFT turns a list in the constructor into a set, which has no order in a file.
    lora.target_modules = sorted(config.adapted_modules)
    return lora


def lora_tensors(state: dict[str, torch.Tensor], config: TiedLoraConfig) -> dict[str, torch.Tensor]:
    """Compute the tensors of a LoRA adapter's file from the tensors of a Tied-LoRA adapter.

    A linear layer has `lora_A.weight`, `(r, in_features)`, and `lora_B.weight`, `(out_features, r)`, whatever the
    layout of its own weight. An embedding has `lora_embedding_A`, `(r, num_embeddings)`, and `lora_embedding_B`,
    `(embedding_dim, r)`.

    Args:
        state: tensors of the Tied-LoRA adapter by their names in a model.
        config: its settings, with `adapted_modules`.
    """
    lora, used = {}, set()
    for module in in_layer_order(config.adapted_modules):
        names = {kind: BASE_PREFIX + name for kind, name in names_in_model(config, module).items()}
        used.update(names.values())
        factors = {kind: state[name] for kind, name in names.items()}
        sizes = FactorNames(**config.adapted_modules[module])
        a, b = factors["A"][:, : sizes.in_features], factors["B"][: sizes.out_features]
        if sizes.padding is not None:
            a = a.index_fill(1, torch.tensor(sizes.padding, device=a.device), 0)
        low, high = ("embedding_A", "embedding_B") if sizes.kind == "embedding" else ("A.weight", "B.weight")
        lora[f"{BASE_PREFIX}{module}.lora_{low}"] = (_scaled(a, factors.get("u")) * config.scaling).to(a.dtype)
        lora[f"{BASE_PREFIX}{module}.lora_{high}"] = _scaled(b, factors.get("v")).to(b.dtype)
    return {name: tensor for name, tensor in state.items() if name not in used} | lora


def _scaled(matrix: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    wide = torch.promote_types(matrix.dtype, torch.float32)
    return scale_rows(matrix.to(wide), None if rows is None else rows.to(matrix.device, wide))


def _of_model(model: nn.Module, adapter_name: str) -> tuple[TiedLoraConfig, dict[str, torch.Tensor]]:
    """Read the settings and the tensors of an adapter in a model, as `read_tied_adapter` does for a saved one.

    This uses PEFT's state dict for a file, so the export is equal to the export of the saved adapter.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile
    configs = getattr(model, "peft_config", None) or {}
    if adapter_name not in configs:
        found = f"It has {', '.join(map(repr, configs))}." if configs else "It has none."
        raise ValueError(f"{type(model).__name__} has no adapter {adapter_name!r}. {found}")
    config = configs[adapter_name]
    _check_type(config, f"The adapter {adapter_name!r}")
    for layer in model.modules():
        if isinstance(layer, TiedLoraLayer) and adapter_name in layer.merged_adapters:
            raise ValueError(
                f"The adapter {adapter_name!r} is merged into the base weights, which would then have its update "
                "twice with the export. Call unmerge_adapter() first, or keep the merged model and export nothing."
            )
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    # In a model that has adapters without a PeftModel, names do not have its prefix.
    saved = {n if n.startswith(BASE_PREFIX) else BASE_PREFIX + n: whole(value) for n, value in saved.items()}
    absent = next((name for name, tensor in saved.items() if tensor.is_meta), None)
    if absent:
        raise ValueError(f"{absent} is on the meta device, without values: load the adapter before it is exported.")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    changes = {}
    if config.base_model_name_or_path is None:
        changes["base_model_name_or_path"] = getattr(base, "name_or_path", None) or None
    if config.task_type is None and config.auto_mapping is None:
        # PeftModel.save_pretrained writes the same, for AutoPeftModel.
        changes["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return _changed(config, changes), state_from_file(saved, config)


def _changed(config: TiedLoraConfig, changes: dict) -> TiedLoraConfig:
    config = copy(config)  # the model keeps its own unchanged
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _check_type(config: PeftConfig, place: str) -> None:
    if is_tied_lora(config):
        return
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind == "LORA":
        raise ValueError(
            f"{place} is a LoRA adapter already: there is nothing to export. If push_to_hub or "
            f"save_pretrained(also_lora=True) wrote it, the tied form is in its subfolder {TIED_FOLDER!r}."
        )
    raise ValueError(f"{place} is an adapter of type {kind}: expected {TiedPeftType.TIED_LORA.value}.")
