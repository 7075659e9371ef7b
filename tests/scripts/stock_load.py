"""What plain transformers loads of the models in a folder: `run_script("stock_load.py", FOLDER)`, without hf_tying."""

import sys
from pathlib import Path

sys.modules["hf_tying"] = None
FOLDERS, sys.argv[1:] = sys.argv[1:], []

import transformers  # noqa: E402

from tests.processes import run_cases  # noqa: E402
from tests.tiny import COMPOSITE, logits  # noqa: E402


def loaded(folder: Path) -> dict:
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "missing": sorted(report["missing_keys"]),
        "logits": [] if config.model_type in COMPOSITE else logits(model.eval()).flatten().tolist(),
    }


run_cases({name: lambda name=name: {each.name: loaded(each) for each in Path(name).iterdir()} for name in FOLDERS})
