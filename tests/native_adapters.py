"""transformers' own adapter methods (`model.add_adapter`), which ask for the PEFT that their version was made for.

transformers 5.24 asks for peft 0.22, which is not released: there these methods refuse every adapter, LoRA as well.
"""

import peft
import pytest
import transformers
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version


def _refusal() -> str:
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        return str(error)
    return ""


#: What transformers says of this PEFT; empty where its adapter methods work.
NATIVE_REFUSAL = _refusal()
needs_native_adapters = pytest.mark.skipif(
    bool(NATIVE_REFUSAL),
    reason=f"transformers {transformers.__version__} with peft {peft.__version__}: {NATIVE_REFUSAL}",
)
ADD_ADAPTER = pytest.param("add_adapter", marks=needs_native_adapters)
