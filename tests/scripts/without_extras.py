"""Tie, untie, report, save and load beside torch, transformers, wrapt and what these need, and nothing else."""

import importlib.metadata as metadata
import re
import sys
import tempfile
from importlib.util import find_spec

NEEDED = ("torch", "transformers", "wrapt", "hf-tying")
#: What the package itself asks for is not there either: it was installed by `pip install --no-deps`.
WITHOUT_DEPENDENCIES = ("hf-tying",)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_with(names: tuple[str, ...]) -> set[str]:
    """The distributions that come with `names`."""
    from packaging.requirements import Requirement

    found, waiting = set(), list(names)
    while waiting:
        name = canonical(waiting.pop())
        if name in found:
            continue
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        requirements = [] if name in WITHOUT_DEPENDENCIES else map(Requirement, lines)
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


THERE = installed_with(NEEDED)
HIDDEN = {
    module
    for module, distributions in metadata.packages_distributions().items()
    if not THERE & {canonical(distribution) for distribution in distributions}
}


class WithoutTheRest:
    """A finder of `sys.meta_path` that finds neither the modules nor the metadata of what is not to be there."""

    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self._finder.find_spec(name, path, target)

    def find_distributions(self, *arguments):
        find = getattr(self._finder, "find_distributions", lambda *_: ())
        return (found for found in find(*arguments) if canonical(found.name) in THERE)


EXTRAS = {"peft", "accelerate", "datasets", "evaluate", "matplotlib", "sacrebleu", "babel", "trl"}
assert EXTRAS <= HIDDEN, f"not to be hidden: {EXTRAS - HIDDEN}"
sys.meta_path[:] = [WithoutTheRest(finder) for finder in sys.meta_path]
assert not [module for module in EXTRAS if find_spec(module)]

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen3Config  # noqa: E402

import hf_tying  # noqa: E402
from hf_tying import assert_tied, tie, tying_report, untie, use_tied_loss  # noqa: E402

config = Qwen3Config(
    vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
)  # fmt: skip
model = tie(AutoModelForCausalLM.from_config(config), "two_way", init_from="target")
assert_tied(model)
ids = torch.arange(8)[None]
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert_tied(again)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    for report in (tying_report(again), tying_report(folder)):
        assert report.scheme == "two_way" and "lm_head.weight" in report.to_table() and report.to_dict()
use_tied_loss(again)
again.train()(input_ids=ids, labels=ids).loss.backward()
untie(model)
assert model.lm_head.weight is not model.model.embed_tokens.weight
try:
    tying_report(model).plot("ties.png")
except ImportError as error:
    assert "hf-tying[plots]" in str(error), error
else:
    raise AssertionError("drawn without matplotlib")
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & EXTRAS, loaded & EXTRAS
print("hidden", len(HIDDEN), hf_tying.__name__)
