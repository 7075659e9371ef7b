"""A loss under the transforms of torch: what plain torch gives there, or one error; never a constant in silence."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_tying.losses import (
    augmented_loss,
    contrastive_weight_tying_loss,
    reference_cross_entropy,
    tied_cross_entropy,
    tied_distillation,
    tied_embedding,
    tied_log_probs,
)
from hf_tying.losses.augmented import reference_augmented_loss

from .helpers import leaf

pytestmark = pytest.mark.usefixtures("slow_half")


def plain_contrastive(hidden, weight, labels):
    counted = labels != -100
    products = hidden[counted] @ F.embedding(labels[counted], weight).T
    return F.cross_entropy(products, torch.arange(products.shape[0]))


def of_each_token(loss):
    return lambda *tensors: loss(*tensors, reduction="none").square().sum()


def through_an_embedding(loss, embed):
    """The matrix is read and multiplied by, as in a tied model."""
    return lambda hidden, weight, labels: loss(hidden + embed(labels.abs() % 7, weight), weight, labels)


def of_token_outputs(hidden, weight, labels):
    found = tied_log_probs(
        hidden, weight, labels, outputs=("log_probs", "entropy", "logsumexp", "mean_logits", "top1")
    )
    return (found.log_probs + found.entropy.square() - found.logsumexp * found.top1 + found.mean_logits).sum()


def of_plain_outputs(hidden, weight, labels):
    logits, counted = hidden @ weight.T, labels != -100
    log_p, places = logits.log_softmax(-1), labels.clamp(min=0)[:, None]
    entropy, top1 = -(log_p.exp() * log_p).sum(-1), logits.argmax(-1) == places[:, 0]
    each = log_p.gather(-1, places)[:, 0] + entropy.square() - logits.logsumexp(-1) * top1 + logits.mean(-1)
    return torch.where(counted, each, 0.0).sum()


TEACHER = torch.linspace(-2, 1.7, 63, dtype=torch.float64).view(9, 7)  # logits of 7 words


def distilled(top_k):
    return lambda hidden, weight, labels: tied_distillation(
        hidden, weight, TEACHER, torch.eye(7, dtype=torch.float64), 2.0, top_k=top_k, labels=labels
    )


def plainly_distilled(top_k):
    def loss(hidden, weight, labels):
        both, counted = [TEACHER / 2, hidden @ weight.T / 2], labels != -100
        if top_k is not None:
            few = TEACHER.topk(top_k, -1).indices
            rest = [x.scatter(-1, few, -torch.inf).logsumexp(-1, keepdim=True) for x in both]
            both = [torch.cat([x.gather(-1, few), r], -1) for x, r in zip(both, rest, strict=True)]
        log_p, log_q = (x.log_softmax(-1) for x in both)
        return 4 * torch.where(counted, (log_p.exp() * (log_p - log_q)).sum(-1), 0.0).sum() / counted.sum()

    return loss


def with_a_wide_head(loss, narrow=torch.float32, **wide):
    """The matrix in a dtype narrower than that of the products."""
    return lambda hidden, weight, labels: loss(
        *((x.to(narrow) if wide else x.to(narrow).double()) for x in (hidden, weight)), labels, **wide
    )


#: This package's loss, and plain torch's of the same value.
LOSSES = {
    "cross entropy": (tied_cross_entropy, reference_cross_entropy),
    "of each token": (of_each_token(tied_cross_entropy), of_each_token(reference_cross_entropy)),
    "with an embedding": (
        through_an_embedding(tied_cross_entropy, tied_embedding),
        through_an_embedding(reference_cross_entropy, F.embedding),
    ),
    "augmented": (augmented_loss, reference_augmented_loss),
    "contrastive": (contrastive_weight_tying_loss, plain_contrastive),
    "outputs of each token": (of_token_outputs, of_plain_outputs),
    "distillation": (distilled(None), plainly_distilled(None)),
    "top-k distillation": (distilled(3), plainly_distilled(3)),
    "a wide head": (
        with_a_wide_head(tied_cross_entropy, head_dtype=torch.float64),
        with_a_wide_head(reference_cross_entropy),
    ),
}


# --- transforms: each gives tensors of a loss, a function of (hidden, weight, labels) --------------------------------


def func_grad(loss, hidden, weight, labels):
    return torch.func.grad_and_value(loss, argnums=(0, 1))(hidden, weight, labels)


def func_jvp(loss, hidden, weight, labels):
    tensors = hidden, weight
    return torch.func.jvp(lambda h, w: loss(h, w, labels), tensors, tuple(x.cos() for x in tensors))


def func_hessian(loss, hidden, weight, labels):
    return torch.func.hessian(lambda h: loss(h, weight, labels))(hidden)


def forward_mode(loss, hidden, weight, labels):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(hidden, hidden.cos()), weight, labels))


def vmap(loss, hidden, weight, labels):
    return torch.func.vmap(loss, in_dims=(0, None, None))(torch.stack([hidden, hidden.cos()]), weight, labels)


def vmap_of_grad(loss, hidden, weight, labels):
    many = torch.stack([weight, weight.cos(), weight.sin()])
    return torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0, None))(hidden, many, labels)


def functional_call(loss, hidden, weight, labels):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros_like(weight))

        def forward(self, hidden, labels):
            return loss(hidden, self.weight, labels)

    given = {"weight": leaf(weight)}
    value = torch.func.functional_call(Head(), given, (hidden, labels))
    return value, *torch.autograd.grad(value, list(given.values()))


def recomputed(reentrant):
    def transform(loss, hidden, weight, labels):
        tensors = leaf(hidden), leaf(weight)
        value = checkpoint(loss, *tensors, labels, use_reentrant=reentrant)
        value.backward()
        return value, *(x.grad for x in tensors)

    return transform


def offloaded(loss, hidden, weight, labels):
    """What is saved goes away and comes back as other tensors."""
    tensors = leaf(hidden), leaf(weight)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().numpy().copy(), torch.from_numpy):
        value = loss(*tensors, labels)
    return value, *torch.autograd.grad(value, tensors)


def twice(loss, hidden, weight, labels):
    tensors = leaf(hidden), leaf(weight)
    value = loss(*tensors, labels) * 2
    return value, *torch.autograd.grad(value, tensors)


def compiled(loss, hidden, weight, labels):
    torch._dynamo.reset()
    tensors = leaf(hidden), leaf(weight)
    value = torch.compile(lambda *x: loss(*x) * 2, backend="aot_eager")(*tensors, labels)
    torch._dynamo.reset()
    return value, *torch.autograd.grad(value, tensors)


def traced(loss, hidden, weight, labels):
    """Traced with other hidden states, and fewer labels that count."""
    before = labels.index_fill(0, torch.tensor([1, 4]), -100)
    function = torch.jit.trace(loss, (hidden.sin(), weight, before), check_trace=False)
    return function(hidden, weight, labels)


TRANSFORMS = {
    each.__name__: each
    for each in (
        func_grad,
        func_jvp,
        func_hessian,
        forward_mode,
        vmap,
        vmap_of_grad,
        functional_call,
        offloaded,
        compiled,
        traced,
    )
} | {"recomputed, old": recomputed(True), "recomputed, new": recomputed(False)}


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.tensor([1, 1, 2, 3, 5, 5, -100, 6, 0])
    return torch.randn(9, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64), labels


# What is compiled has a function of its own here; these two share it with the ones above.
SAME_FUNCTION = {("a wide head", "compiled"), ("distillation", "compiled")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, transform", [pair for pair in product(LOSSES, TRANSFORMS) if pair not in SAME_FUNCTION]
)
def test_a_transform_gives_what_it_gives_of_plain_torch(name, transform):
    tensors = problem()
    loss, plain = LOSSES[name]
    found = TRANSFORMS[transform](loss, *tensors)
    expected = (twice if transform == "compiled" else TRANSFORMS[transform])(plain, *tensors)  # plain torch compiles
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_of_the_gradient_is_refused_also_where_it_is_asked_for_in_many_ways(name):
    hidden, weight, labels = problem()

    def loss(hidden):
        return LOSSES[name][0](hidden, weight, labels)

    with pytest.raises(RuntimeError, match="no gradient of its gradient .create_graph=True.: use .* for that"):
        torch.autograd.functional.hessian(loss, hidden)
    with pytest.raises(RuntimeError, match="no gradient of its gradient .create_graph=True.: use .* for that"):
        torch.autograd.functional.jvp(loss, hidden, hidden)


@pytest.mark.parametrize("name", LOSSES)
def test_many_upstreams_at_once_are_refused_and_plain_torch_takes_them(name):
    ours, plain = LOSSES[name]
    hidden, weight, labels = problem()
    weight = leaf(weight)

    def gradients(loss):
        value = loss(hidden, weight, labels)
        return torch.autograd.grad(value, [weight], torch.arange(3.0).to(value.dtype), is_grads_batched=True)[0]

    with pytest.raises(RuntimeError, match="for one upstream at a time, and got a batch"):
        gradients(ours)
    torch.testing.assert_close(gradients(plain)[2], 2 * gradients(plain)[1])
