"""The control of `tied_lora.py`: the same tests on PEFT's own LoRA."""

import peft
from lora_tests import DEFAULTS, collect, why_not


class LoraConfig(peft.LoraConfig):
    """PEFT's, which remembers its settings as the one of `tied_lora.py` does."""

    def __init__(self, **settings):
        self.settings = settings
        super().__init__(**{name: value for name, value in settings.items() if name in DEFAULTS})


globals().update(collect(LoraConfig))


def left_out(item) -> str | None:
    return why_not(item, LoraConfig)
