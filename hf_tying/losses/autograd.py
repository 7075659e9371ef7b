"""The tied softmax for autograd: gradients made in the forward pass, given out once in the backward pass."""

from dataclasses import dataclass

import torch

from .chunks import default_budget, plan_chunks
from .gradient import deliver
from .options import Options
from .softmax import Gradients, Softmax, cross_entropy


def tied_path(hidden, weight, labels, bias, options: Options, memory_budget: int | None = None) -> torch.Tensor:
    """The loss by this package's own walk over the vocabulary; arguments are checked before."""
    budget = default_budget(*weight.shape, weight.element_size()) if memory_budget is None else memory_budget
    call = _Call(options, budget, labels, torch.is_grad_enabled())
    return _TiedCrossEntropy.apply(hidden, weight, bias, call)


@dataclass
class _Call:
    options: Options
    budget: int
    labels: torch.Tensor
    differentiable: bool


class _TiedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, call: _Call):
        wanted = ctx.needs_input_grad[:3] if call.differentiable else (False, False, False)
        ctx.call, ctx.wanted, ctx.weight, ctx.run = call, wanted, weight, None
        # A float16 gradient cannot be multiplied afterwards by what the backward pass brings (a loss scale): by then
        # it would have overflowed, or be 0.
        ctx.in_backward = call.options.reduction == "none" or wanted[1] and weight.dtype == torch.float16
        if ctx.in_backward:
            ctx.save_for_backward(hidden, weight, bias)
        run = _Run(hidden, weight, bias, call, (False, False, False) if ctx.in_backward else wanted)
        if any(wanted) and not ctx.in_backward:
            ctx.run = run
        return run.loss

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "tied_cross_entropy has no gradient of its gradient (create_graph=True): use "
                "hf_tying.losses.reference_cross_entropy for that."
            )
        if ctx.in_backward:
            run, upstream = _Run(*ctx.saved_tensors, ctx.call, ctx.wanted, upstream=upstream), None
        elif ctx.run is None:
            raise RuntimeError(
                "Trying to go backward through tied_cross_entropy a second time: its gradients were made in the "
                "forward pass, and given out. Compute the loss again, or use reduction='none', which makes them in "
                "the backward pass."
            )
        else:
            run, ctx.run = ctx.run, None
        hidden, weight, bias = run.give_out(upstream)
        if weight is not None:
            weight = deliver(ctx.weight, weight)
        return hidden, weight, bias, None


class _Run:
    """One loss, and its gradients if `wanted` (of hidden, weight, bias).

    Args:
        upstream: what the backward pass brings, where gradients are made there.
    """

    def __init__(self, hidden, weight, bias, call: _Call, wanted, upstream: torch.Tensor | None = None):
        options = call.options
        self.shape, self.dtype = hidden.shape, hidden.dtype
        labels = call.labels.reshape(-1)
        self.tokens = torch.nonzero(labels != options.ignore_index).view(-1)
        flat = hidden.reshape(-1, hidden.shape[-1])
        if len(self.tokens) == len(labels):
            self.tokens = None
        else:
            labels, flat = labels[self.tokens], flat[self.tokens]
        products, exact = _dtypes(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            softmax = self._softmax(flat.to(products), weight, bias, labels, options, exact)
            self.rest = 1.0
            if upstream is not None:
                upstream = upstream.reshape(-1).to(exact)
                if len(upstream) > 1 and self.tokens is not None:
                    upstream = upstream[self.tokens]
                softmax.factor = softmax.factor * upstream * (self.share / self.expected)
            elif products == torch.float16:
                # What is as small as 1 / number of tokens vanishes in it, and a sum over them overflows: half way.
                half_way = max(len(labels), 1) ** 0.5
                self.rest = half_way * self.share
                softmax.factor = softmax.factor / half_way
            else:
                softmax.factor = softmax.factor * self.share
            self.gradients = _allocate(softmax, wanted)
            plan = plan_chunks(
                *softmax.hidden.shape,
                len(weight),
                weight.element_size(),
                exact.itemsize,
                budget=call.budget,
                gradients=bool(self.gradients),
                matrix_gradient=self.gradients.weight is not None,
                accumulates=weight.dtype == exact,
                device=weight.device.type,
            )
            losses = cross_entropy(softmax, plan, self.gradients)
        self.bias_dtype = None if bias is None else bias.dtype
        if options.reduction == "none":
            self.loss = losses if self.tokens is None else losses.new_zeros(call.labels.numel())
            if self.tokens is not None:
                self.loss[self.tokens] = losses
            self.loss = self.loss.view(call.labels.shape)
        else:
            self.loss = losses.sum() * (self.share / self.expected)

    def _softmax(self, hidden, weight, bias, labels, options: Options, exact) -> Softmax:
        """The problem in the exact dtype; `share`: what each token's loss is multiplied by for its gradient."""
        ones = torch.ones(len(labels), dtype=exact, device=hidden.device)
        kept, classes = 1 - options.label_smoothing, options.class_weight
        weights = ones if classes is None else classes.to(exact)[labels]
        smoothing = None
        if options.label_smoothing:
            smoothing = torch.ones(len(weight), dtype=exact, device=hidden.device) if classes is None else classes
            smoothing = smoothing.to(exact) * (options.label_smoothing / len(weight))
        self.expected = options.upstream
        self.share = self.expected
        if options.reduction == "mean":
            count = options.num_items_in_batch
            if count is None:
                count = len(labels) if classes is None else weights.sum()
            count = count.to(ones.device, exact) if isinstance(count, torch.Tensor) else float(count)
            nothing = count == 0
            self.share = self.expected / (torch.where(nothing, 1.0, count) if torch.is_tensor(count) else count or 1.0)
        return Softmax(
            hidden=hidden,
            weight=weight.detach(),
            bias=None if bias is None else bias.detach().to(exact),
            labels=labels,
            true_share=weights * kept,
            factor=ones,
            smoothing=smoothing,
            scale=1.0 if options.logit_scale is None else float(options.logit_scale),
            softcap=None if options.logit_softcap is None else float(options.logit_softcap),
            exact=exact,
        )

    def give_out(self, upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """The gradients for autograd, times what the backward pass brings; they are not held here any more."""
        gradients, self.gradients = self.gradients, Gradients()
        if upstream is not None:
            factor = upstream * (self.rest / self.expected)
            # On a CPU it costs nothing to see that there is nothing to multiply.
            if factor.device.type != "cpu" or not abs(float(factor) - 1) <= 2 * torch.finfo(upstream.dtype).eps:
                for gradient in (gradients.hidden, gradients.weight, gradients.bias):
                    if gradient is not None:
                        gradient.mul_(factor)
        hidden = gradients.hidden
        if hidden is not None:
            if self.tokens is not None:
                counted, hidden = hidden, hidden.new_zeros(self.shape[:-1].numel(), self.shape[-1], dtype=self.dtype)
                hidden[self.tokens] = counted.to(self.dtype)
            hidden = hidden.to(self.dtype).view(self.shape)
        bias = None if gradients.bias is None else gradients.bias.to(self.bias_dtype)
        return hidden, gradients.weight, bias


def _allocate(softmax: Softmax, wanted) -> Gradients:
    hidden, weight, exact = softmax.hidden, softmax.weight, softmax.exact
    make = torch.empty if len(hidden) else torch.zeros
    return Gradients(
        torch.empty_like(hidden, dtype=exact) if wanted[0] else None,
        make(weight.shape, dtype=weight.dtype, device=weight.device) if wanted[1] else None,
        torch.zeros(len(weight), dtype=exact, device=weight.device) if wanted[2] else None,
    )


def _dtypes(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of the matrix products, and of losses and sums."""
    products, device = hidden.dtype, hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        products = torch.get_autocast_dtype(device)
    if products == torch.float64:
        return products, products
    if products != torch.float32 and device == "cpu" and not _has_fast_half(products):
        products = torch.float32
    return products, torch.float32


def _has_fast_half(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` faster than float32 ones.

    Measured on a CPU without (AVX2, torch 2.13): bfloat16 5 to 20 GFLOP/s, float32 90 to 180. Converted block by block
    the products are ten times as fast there, and exact.
    """
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is not None and bool(supported())
