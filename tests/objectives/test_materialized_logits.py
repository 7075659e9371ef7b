"""An operation that cannot be deferred is done to the logits themselves, with the same values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from hf_tying.objectives.deferred_logits import DeferredLogits

from .helpers import WORDS, deferred, same


def in_place(name, *args):
    """A method that changes the tensor that it is called on."""

    def act(logits):
        getattr(logits, name)(*args)
        return logits

    return act


def item_assigned(logits):
    logits[..., 3] = -5.0
    return logits


def augmented(logits):
    logits += torch.ones(WORDS)
    logits *= 2
    logits /= 3
    return logits


def less_one(logits):
    logits -= 1
    return logits


FIRST = torch.zeros(WORDS, dtype=torch.bool).index_fill(0, torch.arange(3), True)
#: What is nowhere noted down.
OTHER = {
    "an index into the words": lambda x: x[..., 3],
    "a slice of the words": lambda x: x[:, :, 2:5],
    "a mask of the words": lambda x: x[:, :, FIRST],
    "a mask of everything": lambda x: x[torch.ones(2, 5, WORDS, dtype=torch.bool)],
    "chosen in two dimensions": lambda x: x[torch.tensor([[0, 1], [1, 0]])],
    "a new dimension": lambda x: x[None],
    "no index": lambda x: x[()],
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(2, 0, 1),
    "mT": lambda x: x.mT,
    "argmax": lambda x: x.argmax(-1),
    "torch.argmax": lambda x: torch.argmax(x, -1),
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: torch.logsumexp(x, dim=-1),
    "sum": lambda x: x.sum(),
    "torch.sum": lambda x: torch.sum(x, 0),
    "max": lambda x: x.max(-1).values,
    "topk": lambda x: torch.topk(x, 3).values,
    "gather": lambda x: x.gather(-1, torch.zeros(2, 5, 1, dtype=torch.long)),
    "flat": lambda x: x.view(-1),
    "flatten": lambda x: torch.flatten(x, 0, 1),
    "words cut up": lambda x: x[..., :10].reshape(2, 5, 2, 5),
    "view of a size that is no word count": lambda x: x.view(5, -1),
    "a shape by name": lambda x: x.reshape(shape=(10, WORDS)),
    "view of another dtype": lambda x: x.view(torch.int32).float(),
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "type": lambda x: x.type(torch.float64),
    "half": lambda x: x.bfloat16(),
    "tanh of tanh": lambda x: F.cross_entropy(x.tanh().tanh().view(-1, WORDS), torch.arange(10)),
    "a sum in another type": lambda x: x.to(torch.float64).sum(0),
    "a capped bias": lambda x: x.tanh() + torch.ones(WORDS),
    "a cap upside down": lambda x: F.cross_entropy(-2 * x.tanh().view(-1, WORDS), torch.arange(10)),
    "a cap without a factor": lambda x: F.cross_entropy(x.tanh().view(-1, WORDS), torch.arange(10)),
    "a cap and two factors": lambda x: F.cross_entropy((3 * (x / 2).tanh() * 2).view(-1, WORDS), torch.arange(10)),
    "a bias for each token": lambda x: x + torch.arange(5.0)[:, None],
    "a bias with a dimension more": lambda x: x[0] + torch.ones(1, 1, WORDS),
    "a bias with a factor": lambda x: torch.add(x, torch.ones(WORDS), alpha=2),
    "a sum with a number": lambda x: x + 1.5,
    "a scale for each word": lambda x: x * torch.linspace(0, 1, WORDS),
    "a quotient by tensors": lambda x: x / torch.linspace(1, 2, WORDS),
    "a quotient by zero": lambda x: (x / 0).isinf(),
    "a rounded quotient": lambda x: x.div(2, rounding_mode="floor"),
    "less a tensor": lambda x: x - torch.ones(WORDS),
    "a tensor less it": lambda x: torch.ones(WORDS) - x,
    "less a number": lambda x: x - 1,
    "a number less it": lambda x: 1 - x,
    "a number by it": lambda x: 1 / x,
    "negative": lambda x: -x,
    "power": lambda x: x**2,
    "absolute": lambda x: abs(x),
    "greater than a number": lambda x: x > 0,
    "greater than a tensor": lambda x: x > torch.zeros(WORDS),
    "equal to a number": lambda x: x == 0.0,
    "a product": lambda x: x @ torch.ones(WORDS, 3),
    "where": lambda x: torch.where(FIRST, x, -1.0),
    "masked_fill": lambda x: x.masked_fill(FIRST, -1.0),
    "cat": lambda x: torch.cat([x, torch.ones(2, 5, WORDS)]),
    "stack": lambda x: torch.stack((x, x)),
    "einsum": lambda x: torch.einsum("btv->tv", x),
    "nll_loss": lambda x: F.nll_loss(F.log_softmax(x.view(-1, WORDS), -1), torch.arange(10)),
    "kl_div": lambda x: F.kl_div(x.log_softmax(-1), torch.full((2, 5, WORDS), 1 / WORDS), reduction="batchmean"),
    "mul_": in_place("mul_", 2.0),
    "div_": in_place("div_", 2.0),
    "add_": in_place("add_", 1.0),
    "clamp_": in_place("clamp_", -1.0, 1.0),
    "masked_fill_": in_place("masked_fill_", FIRST, -1.0),
    "index_fill_": in_place("index_fill_", -1, torch.arange(3), -1.0),
    "an item assigned": item_assigned,
    "augmented": augmented,
    "less one in place": less_one,
}


@pytest.mark.parametrize("name", OTHER)
def test_an_operation_that_is_not_deferred_is_done_to_the_logits_themselves(name):
    results = []
    for logits, leaves in deferred(2, 5):
        torch.manual_seed(0)
        value = OTHER[name](logits)
        value = value.materialize("a test") if type(value) is DeferredLogits else value
        if value.requires_grad:
            value.float().sum().backward()
        results.append([value.detach(), *(x.grad if value.requires_grad else None for x in leaves)])
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or same(found, expected, atol=1e-5)
