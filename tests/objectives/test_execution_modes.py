"""Checkpointing, autocast, compilation and other ways to run a model give the stock step under `use_tied_loss`."""

import copy

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState
from transformers import GPT2LMHeadModel

from hf_tying import TyingError, use_tied_loss
from hf_tying.objectives.step_loss import LossSettings

from ..tiny import WIDTH, tiny_model
from .helpers import (
    AL,
    BY_BLOCKS,
    CWT,
    Seen,
    assert_same_gradients,
    assert_same_step,
    batch,
    gpt2,
    gradients,
    pair,
    step,
)


@pytest.fixture
def accelerate_anew():
    """An `Accelerator` of a test's own precision: there is one state for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("arch", ["gpt2", "bart"])
def test_gradient_checkpointing_gives_the_stock_step(arch, reentrant, seen):
    stock, tied = pair(tiny_model(arch))
    for model in (stock, tied):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert assert_same_step(tied, stock, batch(stock)).logits is None
    assert seen.taken() == BY_BLOCKS


def test_autocast_gives_the_stock_step(seen):
    stock, tied = pair(tiny_model("gpt2"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_step(tied, stock, batch(stock), rtol=1e-3, atol=2e-2)
    assert seen.taken() == BY_BLOCKS
    assert tied(**batch(stock)).loss.dtype == torch.float32


def test_bfloat16_weights_give_the_stock_step(seen):
    stock, tied = pair(tiny_model("gpt2", dtype=torch.bfloat16))
    assert_same_step(tied, stock, batch(stock), rtol=1e-3, atol=2e-2)
    assert seen.taken() == BY_BLOCKS


@pytest.mark.filterwarnings("ignore")
def test_a_model_compiled_before_or_after_use_tied_loss_trains_by_blocks(seen):
    stock, tied = pair(tiny_model("gpt2"))
    inputs = batch(stock)
    expected = step(stock, inputs)
    later = copy.deepcopy(stock)
    compiled = torch.compile(later, backend="aot_eager")
    assert step(compiled, inputs).logits is not None
    use_tied_loss(compiled)
    for model, run in ((tied, torch.compile(tied, backend="aot_eager")), (later, compiled)):
        found = step(run, inputs)
        assert found.logits is None and found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        assert_same_gradients(gradients(model), gradients(stock))
    assert seen.taken() == Seen(blocks=2)
    torch._dynamo.reset()


def test_a_step_without_values_has_the_shapes_of_the_stock_step():
    shapes = []
    for model in pair(tiny_model("llama").to("meta")):
        inputs = {name: batch(model)[name].to("meta") for name in ("input_ids", "labels")}
        model(**inputs).loss.backward()
        shapes.append([None if g is None else g.shape for g in gradients(model).values()])
    assert shapes[0] == shapes[1] and any(shapes[0])


def test_where_one_graph_of_a_step_is_asked_for_the_way_out_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    monkeypatch.setattr(torch._dynamo, "graph_break", lambda msg: told.append(msg))
    model = use_tied_loss(tiny_model("llama")).train()
    step(model, batch(model))
    assert len(told) == 2 and all(
        "compile without fullgraph=True" in each for each in told
    )  # of the step, and its loss


def test_functional_call_gives_its_gradients_to_the_tensors_that_are_given(seen):
    stock, tied = pair(tiny_model("gpt2"))
    assert_same_step(tied, stock, batch(stock))
    tied.zero_grad()
    seen.taken()
    given = {name: p.detach().clone().requires_grad_() for name, p in tied.named_parameters()}
    outputs = torch.func.functional_call(tied, given, (), batch(tied))
    outputs.loss.backward()
    assert outputs.logits is None and seen.taken() == BY_BLOCKS
    assert_same_gradients({name: p.grad for name, p in given.items()}, gradients(stock))
    assert all(g is None for g in gradients(tied).values())


def func_grad(model, parameters, inputs):
    def loss(parameters):
        return torch.func.functional_call(model, parameters, (), inputs).loss

    return torch.func.grad(loss)(parameters)


def func_jvp(model, parameters, inputs):
    def loss(parameters):
        return torch.func.functional_call(model, parameters, (), inputs).loss

    return torch.func.jvp(loss, (parameters,), ({name: p.cos() for name, p in parameters.items()},))


class Loss(torch.nn.Module):
    """A model's loss of ids and labels: what a trace needs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels):
        return self.model(input_ids=input_ids, labels=labels, use_cache=False).loss


def traced(model, parameters, inputs):
    """Traced with other labels."""
    example = inputs["input_ids"], inputs["labels"].roll(1, 0)
    return torch.jit.trace(Loss(model), example, check_trace=False)(inputs["input_ids"], inputs["labels"])


def offloaded(model, parameters, inputs):
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().numpy().copy(), torch.from_numpy):
        loss = torch.func.functional_call(model, parameters, (), inputs).loss
    return torch.autograd.grad(loss, list(parameters.values()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", [func_grad, func_jvp, traced, offloaded])
def test_a_transform_of_the_step_gives_what_it_gives_of_the_stock_step(transform):
    results = []
    for model in pair(tiny_model("gpt2", attn_implementation="eager", dtype=torch.float64)):
        parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        results.append(transform(model, parameters, batch(model)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("objective", [AL, CWT], ids=str)
@pytest.mark.parametrize("transform", [func_grad, func_jvp, traced])
def test_a_transform_of_a_step_with_an_objective_is_refused(transform, objective):
    model = use_tied_loss(gpt2(), objective=objective)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(TyingError, match="the step is transformed .by torch.func, forward-mode AD or a trace"):
        transform(model, parameters, batch(model))


def test_a_frozen_matrix_and_a_frozen_body_give_the_stock_step(seen):
    for frozen in ("transformer.wte", "transformer.h"):
        stock, tied = pair(tiny_model("gpt2"))
        for model in (stock, tied):
            model.get_submodule(frozen).requires_grad_(False)
        assert_same_step(tied, stock, batch(stock))
        assert None in gradients(tied).values() and seen.taken() == BY_BLOCKS


def test_inputs_given_as_embeddings_give_the_stock_step(seen):
    stock, tied = pair(tiny_model("gpt2"))
    inputs = batch(stock)
    inputs["inputs_embeds"] = torch.randn(2, 7, WIDTH)
    del inputs["input_ids"]
    assert assert_same_step(tied, stock, inputs).logits is None
    assert seen.taken() == BY_BLOCKS


@pytest.mark.parametrize("prepare", [
    lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    lambda model: Accelerator(cpu=True, mixed_precision="bf16").prepare(model),
], ids=["dispatched", "mixed precision"])  # fmt: skip
def test_a_model_that_accelerate_has_wrapped_is_refused_and_unchanged(prepare, accelerate_anew):
    model = prepare(gpt2())
    with pytest.raises(TyingError, match=r"forward of this GPT2LMHeadModel is wrapped already.*\(model\) before"):
        use_tied_loss(model)
    assert type(model) is GPT2LMHeadModel and step(model, batch(model)).logits is not None


def test_a_model_that_accelerate_wraps_later_trains_by_blocks(seen, accelerate_anew):
    for prepare in (
        lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True),
        lambda model: Accelerator(cpu=True, mixed_precision="bf16").prepare(model),
    ):
        model = prepare(use_tied_loss(gpt2()))
        assert step(model, batch(model)).logits is None and seen.taken() == BY_BLOCKS
        assert use_tied_loss(model, label_smoothing=0.25)._tied_loss == LossSettings(0.25)
