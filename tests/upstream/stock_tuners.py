"""The control of `tied_tuners.py`: the same tests, without this package."""

import sys

from lora_tests import collect_tuners

assert "hf_tying" not in sys.modules
globals().update(collect_tuners())
