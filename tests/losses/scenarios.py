"""Scenarios of a training step in which one matrix has several uses, which are this package's or torch's."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_tying.losses import reference_cross_entropy, tied_cross_entropy, tied_embedding

from .helpers import leaf


@dataclass
class Uses:
    """The two uses of a matrix, this package's or torch's, and a batch for them."""

    embed: Callable
    loss: Callable
    ids: torch.Tensor
    more: torch.Tensor
    labels: torch.Tensor
    body: torch.Tensor

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.tanh(rows @ self.body)

    def two_way(self, weight: torch.Tensor) -> torch.Tensor:
        return self.loss(self.hidden(self.embed(self.ids, weight)), weight, self.labels)

    def three_way(self, weight: torch.Tensor) -> torch.Tensor:
        memory = self.hidden(self.embed(self.more, weight)).mean(0)
        return self.loss(self.hidden(self.embed(self.ids, weight) + memory), weight, self.labels)


def both(dtype=torch.float64, words=11, width=4, count=9) -> tuple[Uses, Uses, torch.Tensor]:
    """Ours, torch's, and a matrix."""
    batch = [torch.randint(words, (count,)) for _ in range(3)]
    body = torch.randn(width, width, dtype=dtype)
    ours = Uses(tied_embedding, tied_cross_entropy, *batch, leaf(body))
    return ours, Uses(F.embedding, reference_cross_entropy, *batch, leaf(body)), torch.randn(words, width, dtype=dtype)


# --- scenarios: each runs its backward passes, and may return more tensors to compare --------------------------------


def two_way(uses, weight):
    uses.two_way(weight).backward()


def three_way(uses, weight):
    uses.three_way(weight).backward()


def an_embedding_and_no_loss_through_the_head(uses, weight):
    uses.hidden(uses.embed(uses.ids, weight)).sum().backward()


def two_embeddings_and_no_loss_through_the_head(uses, weight):
    uses.hidden(uses.embed(uses.ids, weight) + uses.embed(uses.more, weight)).sum().backward()


def the_head_alone(uses, weight):
    uses.loss(torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).to(weight), weight, uses.labels).backward()


def an_embedding_that_is_not_used(uses, weight):
    uses.embed(uses.more, weight)
    uses.two_way(weight).backward()


def an_embedding_whose_rows_are_used_twice(uses, weight):
    rows = uses.embed(uses.ids, weight)
    (uses.loss(uses.hidden(rows) + rows, weight, uses.labels) + rows.square().sum()).backward()


def no_tokens_at_all(uses, weight):
    rows = uses.embed(uses.ids[:0], weight)
    (uses.loss(uses.hidden(rows), weight, uses.labels[:0]) + uses.body.sum()).backward()


def a_scaled_embedding(uses, weight):
    rows = uses.embed(uses.ids, weight) * math.sqrt(weight.shape[1])
    uses.loss(uses.hidden(rows), weight, uses.labels).backward()


def a_detached_embedding(uses, weight):
    uses.loss(uses.hidden(uses.embed(uses.ids, weight).detach()), weight, uses.labels).backward()


def detached_hidden_states(uses, weight):
    uses.loss(uses.hidden(uses.embed(uses.ids, weight)).detach(), weight, uses.labels).backward()


def an_embedding_of_a_frozen_matrix(uses, weight):
    uses.loss(uses.hidden(uses.embed(uses.ids, weight.detach())), weight, uses.labels).backward()


def a_head_of_a_frozen_matrix(uses, weight):
    uses.loss(uses.hidden(uses.embed(uses.ids, weight)), weight.detach(), uses.labels).backward()


def a_matrix_frozen_after_the_embedding(uses, weight):
    rows = uses.embed(uses.ids, weight)
    weight.requires_grad_(False)
    loss = uses.loss(uses.hidden(rows), weight, uses.labels)
    weight.requires_grad_(True)
    loss.backward()


def a_dense_use_made_after(uses, weight):
    (uses.two_way(weight) + weight.pow(2).sum()).backward()


def a_dense_use_made_before(uses, weight):
    penalty = weight.pow(2).sum()
    (uses.two_way(weight) + penalty).backward()


def a_dense_use_between(uses, weight):
    rows = uses.embed(uses.ids, weight)
    penalty = weight.pow(2).sum()
    (uses.loss(uses.hidden(rows), weight, uses.labels) + penalty).backward()


def a_usual_embedding_beside(uses, weight):
    rows = uses.embed(uses.ids, weight) + F.embedding(uses.more, weight)
    uses.loss(uses.hidden(rows), weight, uses.labels).backward()


def a_usual_head_beside(uses, weight):
    hidden = uses.hidden(uses.embed(uses.ids, weight))
    second = F.cross_entropy(F.linear(hidden, weight), uses.more)
    (uses.loss(hidden, weight, uses.labels) + second).backward()


def two_losses(uses, weight):
    hidden = uses.hidden(uses.embed(uses.ids, weight))
    (0.3 * uses.loss(hidden, weight, uses.labels) + 0.7 * uses.loss(hidden * 2, weight, uses.more)).backward()


def three_losses_and_a_dense_use(uses, weight):
    rows = uses.embed(uses.ids, weight)
    total = weight.square().mean()
    for factor in (1.0, 2.0, 3.0):
        total = total + uses.loss(uses.hidden(rows) * factor, weight, uses.labels)
    total.backward()


def the_losses_of_all_tokens(uses, weight):
    hidden = uses.hidden(uses.embed(uses.ids, weight))
    uses.loss(hidden, weight, uses.labels, reduction="none").square().sum().backward()


def two_backward_passes(uses, weight):
    uses.two_way(weight).backward()
    uses.three_way(weight).backward()


def two_backward_passes_over_one_embedding(uses, weight):
    rows = uses.embed(uses.ids, weight)
    uses.loss(uses.hidden(rows), weight, uses.labels).backward(retain_graph=True)
    uses.loss(uses.hidden(rows), weight, uses.more).backward()


def three_micro_batches(uses, weight):
    for part in torch.arange(9).chunk(3):
        hidden = uses.hidden(uses.embed(uses.ids[part], weight))
        uses.loss(hidden, weight, uses.labels[part], num_items_in_batch=9).backward()


def a_gradient_set_to_zero_and_kept(uses, weight):
    uses.two_way(weight).backward()
    weight.grad.zero_()
    uses.three_way(weight).backward()


def a_step_between(uses, weight):
    uses.two_way(weight).backward()
    torch.optim.SGD([weight], lr=0.1).step()
    uses.two_way(weight).backward()


def recomputed_embedding(reentrant):
    def scenario(uses, weight):
        one = torch.ones((), dtype=weight.dtype, requires_grad=True)  # without it no gradient is asked of the old kind
        rows = checkpoint(lambda ids, one: uses.embed(ids, weight) * one, uses.ids, one, use_reentrant=reentrant)
        uses.loss(uses.hidden(rows), weight, uses.labels).backward()

    return scenario


def recomputed_embedding_given_the_matrix(reentrant):
    def scenario(uses, weight):
        rows = checkpoint(uses.embed, uses.ids, weight, use_reentrant=reentrant)
        uses.loss(uses.hidden(rows), weight, uses.labels).backward()

    return scenario


def recomputed_head(reentrant, **options):
    def scenario(uses, weight):
        def head(hidden):
            return uses.loss(uses.hidden(hidden), weight, uses.labels, **options).sum()

        checkpoint(head, uses.embed(uses.ids, weight), use_reentrant=reentrant).backward()

    return scenario


def recomputed_model(reentrant):
    def scenario(uses, weight):
        checkpoint(uses.two_way, weight, use_reentrant=reentrant).backward()

    return scenario


def gradients_asked_for(uses, weight):
    rows = uses.embed(uses.ids, weight)
    loss = uses.loss(uses.hidden(rows), weight, uses.labels)
    return torch.autograd.grad(loss, [weight, rows, uses.body])


def gradients_asked_for_after_a_backward_pass(uses, weight):
    """What the pass before has left is not this one's to add to."""
    uses.two_way(weight).backward()
    return torch.autograd.grad(uses.embed(uses.more, weight).square().sum(), [weight])


def the_gradient_of_the_matrix_alone_asked_for(uses, weight):
    uses.two_way(weight).backward(inputs=[weight])


def the_gradient_of_the_body_alone_asked_for(uses, weight):
    uses.two_way(weight).backward(inputs=[uses.body])


def a_view_for_each_use(uses, weight):
    """As `RoleMeter` has it."""
    seen = []
    views = [weight.view_as(weight) for _ in range(2)]
    for view in views:
        view.register_hook(lambda grad: seen.append(grad.clone()))
    uses.loss(uses.hidden(uses.embed(uses.ids, views[0])), views[1], uses.labels).backward()
    return seen


def one_view_for_all_uses(uses, weight):
    uses.three_way(weight.view_as(weight)).backward()


def a_matrix_that_is_computed(uses, weight):
    made = weight * 1.5
    made.retain_grad()
    uses.three_way(made).backward()
    return [made.grad]


def a_computed_matrix_changed_in_place_between_its_uses(uses, weight):
    made = weight.clone()
    rows = uses.embed(uses.ids, made)
    made.mul_(2)
    uses.loss(uses.hidden(rows), made, uses.labels).backward()


def a_transposed_matrix(uses, weight):
    uses.three_way(weight.t().contiguous().t()).backward()


def a_part_of_the_matrix(uses, weight):
    """A head over the first words alone."""
    hidden = uses.hidden(uses.embed(uses.ids, weight))
    uses.loss(hidden, weight[:7], uses.labels % 7).backward()


def a_backward_pass_within_another(uses, weight):
    rows = uses.embed(uses.ids, weight)
    hidden = uses.hidden(rows)
    inner = uses.three_way(weight)
    hidden.register_hook(lambda grad: inner.backward())
    uses.loss(hidden, weight, uses.labels).backward()


def a_hook_that_keeps_gradients(uses, weight):
    kept = []
    loss = uses.two_way(weight)
    loss.grad_fn.register_hook(lambda inputs, outputs: kept.extend(inputs))
    loss.backward()


def a_hook_that_keeps_gradients_and_a_dense_use(uses, weight):
    kept = []
    loss = uses.two_way(weight)
    loss.grad_fn.register_hook(lambda inputs, outputs: kept.extend(inputs))
    (loss + weight.pow(2).sum()).backward()


def a_hook_that_keeps_gradients_and_a_second_backward_pass(uses, weight):
    """What it keeps is held by one more, as in the pass before it was by autograd."""
    kept = torch.zeros_like(weight)
    loss = uses.loss(uses.hidden(weight[uses.ids].detach()), weight, uses.labels)
    if uses.embed is tied_embedding:
        loss.grad_fn.register_hook(lambda inputs, outputs: setattr(kept, "grad", inputs[1]))
    loss.backward()
    return torch.autograd.grad(uses.embed(uses.more, weight).square().sum(), [weight])


SCENARIOS = {
    scenario.__name__.replace("_", " "): scenario
    for scenario in (
        two_way,
        three_way,
        an_embedding_and_no_loss_through_the_head,
        two_embeddings_and_no_loss_through_the_head,
        the_head_alone,
        an_embedding_that_is_not_used,
        an_embedding_whose_rows_are_used_twice,
        no_tokens_at_all,
        a_scaled_embedding,
        a_detached_embedding,
        detached_hidden_states,
        an_embedding_of_a_frozen_matrix,
        a_head_of_a_frozen_matrix,
        a_matrix_frozen_after_the_embedding,
        a_dense_use_made_after,
        a_dense_use_made_before,
        a_dense_use_between,
        a_usual_embedding_beside,
        a_usual_head_beside,
        two_losses,
        three_losses_and_a_dense_use,
        the_losses_of_all_tokens,
        two_backward_passes,
        two_backward_passes_over_one_embedding,
        three_micro_batches,
        a_gradient_set_to_zero_and_kept,
        a_step_between,
        gradients_asked_for,
        gradients_asked_for_after_a_backward_pass,
        the_gradient_of_the_matrix_alone_asked_for,
        the_gradient_of_the_body_alone_asked_for,
        a_view_for_each_use,
        one_view_for_all_uses,
        a_matrix_that_is_computed,
        a_computed_matrix_changed_in_place_between_its_uses,
        a_transposed_matrix,
        a_part_of_the_matrix,
        a_backward_pass_within_another,
        a_hook_that_keeps_gradients,
        a_hook_that_keeps_gradients_and_a_dense_use,
        a_hook_that_keeps_gradients_and_a_second_backward_pass,
    )
}
for reentrant in (False, True):
    old = "old" if reentrant else "new"
    SCENARIOS |= {
        f"recomputed embedding, {old}": recomputed_embedding(reentrant),
        f"recomputed embedding given the matrix, {old}": recomputed_embedding_given_the_matrix(reentrant),
        f"recomputed head, {old}": recomputed_head(reentrant),
        f"recomputed head, the losses of all tokens, {old}": recomputed_head(reentrant, reduction="none"),
        f"recomputed model, {old}": recomputed_model(reentrant),
    }
