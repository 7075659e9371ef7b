"""Models to train in several processes, and their training: gradients and weights beside one process's.

Each kind is a model in float64 without dropout, a tie and an objective. An engine is what wraps the model and steps
it. Whatever it does, the gradient of the first step and the weights after the second are those of one process that has
the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from hf_tying import TyingConfig, assert_tied, tie, use_projection, use_tied_loss
from hf_tying.config import ProjectionConfig
from hf_tying.depth import share_layers
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM
from hf_tying.objectives import AugmentedObjective, ContrastiveObjective
from hf_tying.ties.depth_groups import FACTOR, SUFFIX
from hf_tying.ties.slots import canonical

from .objectives.helpers import three_way
from .tied_lora import tied_lora
from .tiny import layer_pair, tiny_inputs, tiny_model, untied_model, without_dropout
from .tiny_translation import translation_inputs

ROWS, STEPS, RATE = 4, 2, 0.1


def stock(arch: str, spec: str) -> PreTrainedModel:
    """`arch` with matrices of its own, tied by a scheme, or in its `"layers"`."""
    if arch == "bert":  # untied, it has an output bias that it does not use
        return tie(tiny_model(arch, dtype=torch.float64), spec)
    model = untied_model(arch, dtype=torch.float64)
    if spec == "layers":
        return tie(model, {"layers": layer_pair(model)}, init_from="mean")
    return tie(model, spec, init_from="source" if spec == "source_target" else "output")


def projected(arch: str) -> PreTrainedModel:
    model = use_projection(stock(arch, "two_way"))
    with torch.no_grad():
        model.get_output_embeddings().projection.weight.add_(0.1 * torch.randn(16, 16, dtype=torch.float64))
    return model


def lstm() -> PreTrainedModel:
    torch.manual_seed(0)
    config = TiedLSTMConfig(
        vocab_size=64, embedding_size=8, hidden_size=8,
        tying=TyingConfig("two_way", projection=ProjectionConfig()).to_dict(),
    )  # fmt: skip
    return TiedLSTMForCausalLM(config).double()


def grown_layers() -> PreTrainedModel:
    """Two layers that are four visits, the later ones damped and with low-rank differences; their norms stay apart."""
    model = untied_model("llama", dtype=torch.float64)
    relax = {"kind": "lora", "rank": 2}
    return different(share_layers(model, order=[0, 1, 0, 1], grow=True, private="*norm*", relax=relax))


def relaxed(arch: str, names: list[str], **settings) -> PreTrainedModel:
    model = untied_model(arch, dtype=torch.float64)
    return different(tie(model, {"relaxed": {"names": names, "relax": settings}}, init_from="mean"))


def different(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with differences and factors that are not at their start, zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if SUFFIX in name or FACTOR in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def objective(model: PreTrainedModel, of) -> PreTrainedModel:
    return use_tied_loss(model, objective=of)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "llama two_way": lambda: stock("llama", "two_way"),
    "llama two_way, uneven parts": lambda: tie(
        tiny_model("llama", vocab_size=65, tie_word_embeddings=False).double(), "two_way", init_from="output"
    ),
    "gpt2 two_way": lambda: stock("gpt2", "two_way"),
    "bart two_way": lambda: stock("bart", "two_way"),
    "bart three_way": lambda: stock("bart", "three_way"),
    "bart source_target": lambda: stock("bart", "source_target"),
    "t5 three_way": lambda: stock("t5", "three_way"),
    "marian three_way": lambda: stock("marian", "three_way"),
    "bert two_way": lambda: stock("bert", "two_way"),
    "llama layers": lambda: stock("llama", "layers"),
    "encoder-decoder three_way": lambda: three_way().double(),
    "llama Tied-LoRA": lambda: tied_lora(
        tiny_model("llama", dtype=torch.float64), target_modules="all-linear"
    ).double(),
    "llama tied loss": lambda: use_tied_loss(stock("llama", "two_way")),
    "llama untied, tied loss": lambda: use_tied_loss(stock("llama", "none")),
    "bart tied loss": lambda: use_tied_loss(stock("bart", "three_way")),
    "t5 tied loss": lambda: use_tied_loss(stock("t5", "three_way")),
    "llama AL": lambda: objective(stock("llama", "two_way"), AugmentedObjective(temperature=5.0, alpha=2.0)),
    "bart AL": lambda: objective(stock("bart", "three_way"), AugmentedObjective(temperature=5.0, alpha=2.0)),
    "llama CWT": lambda: objective(stock("llama", "two_way"), ContrastiveObjective(gather=True)),
    "bert CWT": lambda: objective(stock("bert", "two_way"), ContrastiveObjective(gather=True)),
    "gpt2 PR": lambda: projected("gpt2"),
    "lstm PR": lstm,
    "llama shared layers, relaxed": grown_layers,
    "gpt2 relaxed": lambda: relaxed("gpt2", ["transformer.wte.weight", "lm_head.weight"], kind="scale"),
    "llama layers, relaxed": lambda: relaxed("llama", layer_pair(untied_model("llama")), kind="basis", bound=0.5),
}  # fmt: skip
#: Kinds with matrices that are made of a shared one and a difference.
DIFFERENT = tuple(kind for kind in KINDS if kind.endswith("relaxed"))
#: Kinds whose steps compute no logits.
BY_BLOCKS = tuple(kind for kind in KINDS if kind.endswith(("tied loss", "AL", "CWT")))
#: Kinds whose bytes are counted: a loss by blocks sends what the whole one sends.
COUNTED = tuple(kind for kind in KINDS if kind not in BY_BLOCKS or kind in ("llama tied loss", "bert CWT"))


def inputs(model: nn.Module, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    whole = (translation_inputs if base.config.is_encoder_decoder else tiny_inputs)(base, batch=ROWS)
    if base.config.model_type == "tied_lstm":
        whole.pop("attention_mask")
    return {name: value[rows] for name, value in whole.items()}


def own_rows() -> slice:
    """The part of the batch that this process trains on."""
    each = ROWS // dist.get_world_size()
    return slice(each * dist.get_rank(), each * (dist.get_rank() + 1))


@dataclass
class Trained:
    """What two steps have made: by parameter name, the gradient of the first and the values after the second."""

    gradient: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    start: dict[str, torch.Tensor]
    without_logits: bool


def start(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return without_dropout(KINDS[kind]())


@cache
def alone(kind: str) -> Trained:
    """One process, the whole batch, no engine: as if there were no group of processes."""
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        return trained_alone(start(kind))


def trained_alone(model: nn.Module) -> Trained:
    """Two steps of `model` on the whole batch, without an engine."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=RATE)
    return train(
        model, lambda: model(**inputs(model)), lambda loss: loss.backward(), optimizer.step, optimizer.zero_grad,
        full_gradient=lambda p: p.grad, full=lambda p: p.detach().clone(),
    )  # fmt: skip


def train(model, forward, backward, step, zero_grad, full_gradient, full) -> Trained:
    """Two steps. `full_gradient` and `full` give whole tensors of a parameter; all processes call them together."""
    gradient, without_logits = {}, True
    start = {plain(name): full(p) for name, p in model.named_parameters()}
    for i in range(STEPS):
        zero_grad()
        outputs = forward()
        without_logits &= outputs.get("logits") is None
        backward(outputs.loss)
        if i == 0:
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            found = {name: full_gradient(p) for name, p in named}
            gradient = {plain(name): value.clone() for name, value in found.items() if value is not None}
        step()
    assert_tied(model)
    return Trained(gradient, {plain(name): full(p) for name, p in model.named_parameters()}, start, without_logits)


def plain(name: str) -> str:
    return canonical(name).removeprefix("module.")


def beside_one(found: Trained, kind: str) -> dict:
    """`beside` of one process. Process 0 compares: the results of the others are not read."""
    return {} if dist.get_rank() else beside(found, alone(kind))


def beside(found: Trained, expected: Trained) -> dict:
    """The largest differences, relative to the largest value; names that one of the two has not."""

    def largest(a: dict, b: dict) -> float:
        scale = max(value.abs().max().item() for value in b.values())
        return max((a[name] - b[name]).abs().max().item() for name in a.keys() & b.keys()) / scale

    return {
        "gradient": largest(found.gradient, expected.gradient),
        "weights": largest(found.weights, expected.weights),
        "moved": largest(found.weights, expected.start),
        "names": sorted(found.weights.keys() ^ expected.weights.keys()),
        "without gradient": sorted(
            name for name in found.gradient.keys() ^ expected.gradient.keys()
            if (expected.gradient | found.gradient)[name].abs().max() > 0
        ),
        "without logits": found.without_logits,
    }  # fmt: skip
