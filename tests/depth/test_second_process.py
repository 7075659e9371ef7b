"""Every pattern on every architecture, read in a second process by plain transformers, and in one by this package.

Long, so in `make test-upstream` alone.
"""

import json
import os

import pytest
import torch

from hf_tying import share_layers
from hf_tying.depth.patterns import PATTERNS

from ..processes import run_python
from .models import inputs, output, plain

ARCHITECTURES = ["llama", "qwen3", "gpt2", "opt", "bert", "modernbert", "t5", "bart", "vision", "speech"]
UNIQUE = {"sandwich": 3, "middle_cycle": 3, "all": 1}
CASES = [f"{name} {pattern}" for name in ARCHITECTURES for pattern in PATTERNS]

READER = """
import json, pathlib, sys
import torch
import transformers
if sys.argv[2] == "hf_tying":
    import hf_tying

found = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    held = torch.load(folder / "expected.pt")
    cls = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    model.eval()
    with torch.no_grad():
        apart = (model(**held["inputs"]).logits - held["logits"]).abs().max().item()
    count = len({id(parameter) for parameter in model.parameters()})
    found[folder.name] = {"apart": apart, "missing": sorted(info["missing_keys"]), "parameters": count}
assert ("hf_tying" in sys.modules) == (sys.argv[2] == "hf_tying")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder for each case, with what the model computes."""
    folder = tmp_path_factory.mktemp("shared")
    for case in CASES:
        name, pattern = case.split()
        model = share_layers(plain(name), pattern, UNIQUE.get(pattern, 2), init="average")
        model.save_pretrained(folder / case)
        torch.save({"inputs": inputs(model), "logits": output(model)}, folder / case / "expected.pt")
    return folder


@pytest.fixture(scope="module", params=["transformers", "hf_tying"])
def read(request, work):
    """By whom, and what that process found."""
    done = run_python("-c", READER, work, request.param, timeout=600)
    return request.param, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not os.environ.get("ZOO"), reason="make test-upstream")
@pytest.mark.parametrize("case", CASES)
def test_another_process_computes_the_same(read, case):
    reader, found = read
    name, pattern = case.split()
    assert found[case]["apart"] < 1e-5 and not found[case]["missing"]
    model = plain(name)
    if reader == "hf_tying":
        share_layers(model, pattern, UNIQUE.get(pattern, 2))
    assert found[case]["parameters"] == len([*model.parameters()])
