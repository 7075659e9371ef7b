"""What others load from the Hub: `run_script("hub_load.py", "with" or "without", variables=hub.variables)`.

`without`: in a process in which `import hf_tying` fails.
"""

import sys

WITH = sys.argv.pop(1) == "with"
if WITH:
    import hf_tying  # noqa: F401
else:
    sys.modules["hf_tying"] = None

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from tests.native_adapters import NATIVE_REFUSAL  # noqa: E402
from tests.processes import run_cases  # noqa: E402
from tests.tiny import tiny_inputs  # noqa: E402

MODELS = ("base", "tied", "group", "projection", "tied-trainer")
NATIVE = () if NATIVE_REFUSAL else ("native",)
ADAPTERS = ("peft", *NATIVE, "trainer")


def logits(model) -> list[float]:
    with torch.no_grad():
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        return model.eval()(**tiny_inputs(inner)).logits.flatten().tolist()


def of_model(name: str) -> dict:
    model = AutoModelForCausalLM.from_pretrained(f"tester/{name}")
    return {"logits": logits(model), "parameters": sum(p.numel() for p in model.parameters())}


def of_adapter(name: str, base: str = "tester/base", **where) -> dict:
    try:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), f"tester/{name}", **where)
    except KeyError as error:
        return {"error": str(error)}
    return {"logits": logits(model), "kind": str(model.peft_config["default"].peft_type)}


CASES = {name: lambda name=name: of_model(name) for name in MODELS}
CASES |= {name: lambda name=name: of_adapter(name) for name in ADAPTERS}
CASES |= {f"{name}, tied": lambda name=name: of_adapter(name, subfolder="tied_lora") for name in ADAPTERS}
CASES |= {
    "two": lambda: of_adapter("two", subfolder="second"),
    "two, tied": lambda: of_adapter("two", subfolder="second/tied_lora"),
    "sft": lambda: of_adapter("sft", base="tester/base-of-sft"),
    "peft, dev": lambda: of_adapter("peft", revision="dev"),
}
if NATIVE:
    CASES["sft, by transformers"] = lambda: of_model("sft")

if __name__ == "__main__":
    run_cases(CASES)
