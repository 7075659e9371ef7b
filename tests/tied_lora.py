"""Tiny models under Tied-LoRA adapters that are not zero, and the plain form of their update."""

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_tying.peft import TiedLoraConfig
from hf_tying.peft.layer import TiedLoraLayer

from .tiny import tiny_config, tiny_inputs, tiny_model

#: The modules that the paper adapts, by the names of each architecture.
QKV = {
    "gpt2": ["c_attn"],
    "bert": ["query", "key", "value"],
    "t5": ["q", "k", "v"],
    **dict.fromkeys(("llama", "marian", "bart", "mistral", "opt", "gemma3_text"), ["q_proj", "k_proj", "v_proj"]),
}


def tied_lora(model: nn.Module, seed: int = 1, adapter_name: str = "default", **config) -> PeftModel:
    """`model` under a Tied-LoRA adapter that has been trained a little, so that no factor is at its initial value."""
    config = {"r": 4, "target_modules": QKV.get(getattr(getattr(model, "config", None), "model_type", None))} | config
    peft_model = get_peft_model(model, TiedLoraConfig(**config), adapter_name=adapter_name)
    shake(peft_model, seed)
    return peft_model.eval()


def two_adapters() -> PeftModel:
    """A Llama with `default`, TL6 on q, k and v; and `second`, TL5 of another rank on other modules."""
    model = tied_lora(tiny_model("llama"))
    model.add_adapter("second", TiedLoraConfig(r=2, variant="TL5", target_modules=["q_proj", "down_proj"]))
    return shake(model, 2, "second").eval()


def shake(model: nn.Module, seed: int = 1, adapter_name: str = "default") -> nn.Module:
    """Random values for every factor of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tied_lora_" in name and f".{adapter_name}" in name:
                value = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.3 * value if "lora_u" in name or "lora_v" in name else 0.3 * value)
    return model


def tiny_classifier(arch: str, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(tiny_config(arch, num_labels=2, **changes)).eval()


def outputs(model: nn.Module) -> torch.Tensor:
    """Logits of the same inputs for every model of an architecture."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        return model(**tiny_inputs(base)).logits


def layers_of(model: nn.Module) -> dict[str, TiedLoraLayer]:
    """The adapted modules by their names in the base model."""
    return {layer.module_name: layer for layer in model.modules() if isinstance(layer, TiedLoraLayer)}


def shares_its_factors(model: nn.Module, adapter: str = "default") -> bool:
    """Whether every A and B that several layers name is one parameter."""
    used = [layer.uses[adapter] for layer in layers_of(model).values() if adapter in layer.uses]
    return all(
        len({id(getattr(factors, kind).weight) for factors in used if getattr(factors.names, kind) == name}) == 1
        for kind in "AB"
        for name in {getattr(factors.names, kind) for factors in used}
    )


def dense_updates(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """scaling * diag(v) B diag(u) A of each adapted module, `(out, in)`, from the named parameters alone."""
    state = model.state_dict()
    config = model.peft_config[adapter_name]
    start = next(key for key in state if ".tied_lora_A." in key).partition("tied_lora_A")[0]
    updates = {}
    for name, layer in layers_of(model).items():
        names = config.adapted_modules[name]
        a = state[f"{start}tied_lora_A.{adapter_name}.{names['A']}.weight"][:, : layer.in_features]
        b = state[f"{start}tied_lora_B.{adapter_name}.{names['B']}.weight"][: layer.out_features]
        u = state[f"{start}tied_lora_u.{adapter_name}.{names['u']}.weight"] if config.train_u else torch.ones(len(a))
        v = (
            state[f"base_model.model.{name}.tied_lora_v.{adapter_name}.weight"]
            if config.train_v
            else torch.ones(len(b))
        )
        updates[name] = config.alpha / config.r * torch.diag(v) @ b @ torch.diag(u) @ a
    return updates


def merged_by_hand(model: PeftModel, base: PreTrainedModel, adapter_name: str = "default") -> PreTrainedModel:
    """`base` with the plain updates added to its weights."""
    with torch.no_grad():
        for name, update in dense_updates(model, adapter_name).items():
            weight = base.get_submodule(name).weight
            weight += update if weight.shape == update.shape and not _transposed(base, name) else update.T
    return base


def _transposed(model: nn.Module, name: str) -> bool:
    return type(model.get_submodule(name)).__name__ in ("Conv1D", "Embedding")
