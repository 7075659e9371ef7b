"""PEFT's tests of what all of its methods share, as they are, while this package is imported."""

from lora_tests import collect_tuners

import hf_tying  # noqa: F401
import hf_tying.peft  # noqa: F401

globals().update(collect_tuners())
