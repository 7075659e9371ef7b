"""The methods that `run_tied_lora.py` compares: their flags, their PEFT configs over the same modules, their rates."""

from dataclasses import asdict, dataclass, field, fields, make_dataclass

import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model

from hf_tying import TyingError
from hf_tying.peft import TiedLoraConfig
from hf_tying.peft.config import VARIANTS
from hf_tying.peft.layer import TiedLoraLayer
from hf_tying.training.command_line import naming

OTHERS = ("lora", "vera")
# A flag has one type, so these take the narrower one of those that the field has.
_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "qkv_modules", "layers_pattern")
_TYPES = dict.fromkeys(_LISTS, list[str] | None) | {"layers_to_transform": list[int] | None}
_PLAIN = ("r", "variant", "alpha", "dropout", "share_by", "bias", "u_initial")
_SWITCHES = ("train_A", "train_B", "train_u", "train_v", "tie_A", "tie_B", "tie_qkv")

#: Flags with the names, defaults and help of `TiedLoraConfig`'s own fields.
AdapterArguments = make_dataclass(
    "AdapterArguments",
    [
        (item.name, _TYPES.get(item.name, item.type), field(default=item.default, metadata=dict(item.metadata)))
        for item in fields(TiedLoraConfig)
        if item.name in (*_PLAIN, *_SWITCHES, *_TYPES)
    ],
)


@dataclass(frozen=True)
class Method:
    """One way to adapt the model: its name, its config, and the learning rate that it is trained with."""

    name: str
    config: PeftConfig
    learning_rate: float


def tied_config(adapter, task_type: str, variant: str | None = None) -> TiedLoraConfig:
    """The config that the flags say, or that of another preset with the rest of the flags."""
    values = asdict(adapter)
    if variant:
        values |= dict.fromkeys(_SWITCHES) | {"variant": variant}
    if len(values["target_modules"] or ()) == 1 and not values["target_modules"][0].replace(".", "_").isidentifier():
        values["target_modules"] = values["target_modules"][0]  # a regular expression, or all-linear
    with naming("Tied-LoRA"):
        return TiedLoraConfig(task_type=task_type, **values)


def adapted_modules(make_model, config: TiedLoraConfig) -> dict[str, tuple[int, int]]:
    """The modules that Tied-LoRA adapts, and their `(in_features, out_features)`, from a model without memory.

    Args:
        make_model: makes the model.
        config: of the adapter, which is not changed.
    """
    with torch.device("meta"), naming("Tied-LoRA on this model"):
        model = get_peft_model(make_model(), TiedLoraConfig(**_inputs(config)), low_cpu_mem_usage=True)
    layers = [module for module in model.modules() if isinstance(module, TiedLoraLayer)]
    return {layer.module_name: (layer.in_features, layer.out_features) for layer in layers}


def _inputs(config: TiedLoraConfig) -> dict:
    return {item.name: getattr(config, item.name) for item in fields(config) if item.init and item.name != "peft_type"}


def compared(names: str, config: TiedLoraConfig) -> list[str]:
    """The names of all methods, Tied-LoRA first: its variant's, or `tied` for switches without a name."""
    own = config.variant or "tied"
    others = [name.strip() for name in names.split(",") if name.strip()]
    for name in others:
        if name not in (*OTHERS, *VARIANTS):
            raise TyingError(f"--compare has {name!r}: expected some of {', '.join((*OTHERS, *VARIANTS))}.")
    if len({own, *others}) < 1 + len(others):
        raise TyingError(f"--compare is {names!r}: expected each method once, and {own} runs anyway.")
    return [own, *others]


def learning_rates(pairs: list[str], default: float, names: list[str]) -> dict[str, float]:
    """The rate of each method, from `name=rate`; `tied` stands for all variants that are not named."""
    known, rates = (*OTHERS, *VARIANTS, "tied"), {}
    for pair in ",".join(pairs).split(",") if pairs else ():
        name, _, rate = pair.partition("=")
        if name not in known:
            raise TyingError(f"--learning_rates has {name!r}: expected some of {', '.join(known)}.")
        try:
            rates[name] = float(rate)
        except ValueError:
            raise TyingError(f"--learning_rates has {pair!r}: expected such as {name}=1e-3.") from None
    of_tied = rates.get("tied", default)
    return {name: rates.get(name, default if name in OTHERS else of_tied) for name in names}


def make_methods(names: list[str], arguments, adapter, config: TiedLoraConfig, targets, rates) -> list[Method]:
    """All methods, on the same modules and with the same rank, scaling and dropout.

    Args:
        names: of the methods, Tied-LoRA of the flags first.
        arguments: the script's `ExperimentArguments`.
        adapter: the `AdapterArguments`.
        config: of the first method.
        targets: names of the modules that it adapts.
        rates: learning rates by name.
    """
    same = {
        "task_type": config.task_type,
        "target_modules": sorted(targets),
        "modules_to_save": adapter.modules_to_save,
    }
    lora_bias = "lora_only" if config.bias == "tied_lora_only" else config.bias
    configs = {names[0]: config}
    for name in names[1:]:
        if name == "lora":
            configs[name] = LoraConfig(
                r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, bias=lora_bias, **same
            )
        elif name == "vera":
            vera_bias = lora_bias.replace("lora", "vera")
            with naming("VeRA"):
                configs[name] = VeraConfig(
                    r=arguments.vera_r or config.r, vera_dropout=config.dropout, bias=vera_bias, **same
                )
        else:
            configs[name] = tied_config(adapter, config.task_type, name)
    return [Method(name, configs[name], rates[name]) for name in names]
