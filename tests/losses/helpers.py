"""What a loss gives and what it costs: its value, its gradients, the ways through the walk, the memory of a step."""

import gc
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from hf_tying.losses import autograd, chunks, reference_cross_entropy, softmax, walk

NAMES = ("loss", "hidden", "weight", "bias")


def steady(examples: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=slow)


# --- values and gradients --------------------------------------------------------------------------------------------


def leaf(tensor, dtype=None):
    return None if tensor is None else tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()


def results(function, hidden, weight, labels, bias=None, upstream=None, **options) -> dict[str, torch.Tensor | None]:
    """The loss, and the gradients of all that is trained. `upstream` is what the loss is multiplied by afterwards."""
    leaves = [leaf(hidden), leaf(weight), leaf(bias)]
    loss = function(leaves[0], leaves[1], labels, bias=leaves[2], **options)
    (loss if upstream is None else loss * upstream).sum().backward()
    return dict(zip(NAMES, (loss.detach(), *(x if x is None else x.grad for x in leaves)), strict=True))


def exactly(hidden, weight, labels, bias=None, class_weight=None, **options) -> dict[str, torch.Tensor | None]:
    """The same in plain torch in float64, from the inputs as they were rounded."""
    wide = [None if x is None else x.double() for x in (hidden, weight, bias, class_weight)]
    return results(reference_cross_entropy, wide[0], wide[1], labels, wide[2], class_weight=wide[3], **options)


def naive(hidden, weight, labels, bias=None):
    """The usual path of a model in half precision: logits in its dtype, the loss in float32."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)


def error(found, expected) -> float:
    """Relative, in the norm."""
    return float((found.double() - expected).norm() / expected.norm())


def worst(found: dict, expected: dict) -> float:
    """The largest relative error of the loss and the gradients; infinite where one is no number."""
    errors = [error(found[name], expected[name]) for name in NAMES if expected[name] is not None]
    return max(math.inf if math.isnan(each) else each for each in errors)


@contextmanager
def watched(at_work=None, narrowest=128, fewest_rows=chunks.FEWEST_ROWS):
    """Count which ways through the walk are gone; with constants small enough for small shapes to go many."""
    seen = Counter()
    plan_chunks, places, finish = autograd.plan_chunks, walk._Memory.places, softmax.Logits.finish
    exponentials = softmax.Exponentials.finish

    def planned(*args, **kwargs):
        plan = plan_chunks(*args, **kwargs)
        seen["two walks" if kwargs["gradients"] else "one walk"] += 1
        if kwargs["gradients"]:
            seen["tokens cut" if len(plan.tokens) > 1 else "tokens whole"] += 1
        seen["words cut"] += len(plan.blocks) > 1
        return plan

    def placed(memory, plan, rows):
        found = places(memory, plan, rows)
        for place in found:
            if place is None:
                seen["computed again"] += 1
            elif not memory.is_borrowed(place):
                seen["in the buffer"] += 1
            else:
                count, width = rows.stop - rows.start, memory.borrowed.shape[1]
                seen["in its own rows" if count <= width else "one after the other"] += 1
        return found

    def logits(values):
        seen["logits"] += 1
        return finish(values)

    def exponents(values):
        fits = exponentials(values)
        seen["exponentials" if fits else "overflows"] += 1
        return fits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "plan_chunks", planned)
        patch.setattr(walk._Memory, "places", placed)
        patch.setattr(softmax.Logits, "finish", logits)
        patch.setattr(softmax.Exponentials, "finish", exponents)
        if at_work is not None:
            patch.setattr(chunks, "_AT_WORK", {"cpu": at_work})
        patch.setattr(chunks, "_NARROWEST", narrowest)
        patch.setattr(chunks, "FEWEST_ROWS", fewest_rows)
        yield seen


EVERY_WAY = {"one walk", "two walks", "tokens cut", "tokens whole", "words cut", "computed again", "in the buffer",
             "in its own rows", "one after the other", "exponentials", "overflows", "logits"}  # fmt: skip


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass
class Meter:
    """Bytes above the start, at most; and of each size how many allocations there were, and were alive at once."""

    peak: int
    together: Counter
    allocated: Counter

    def as_large_as(self, size: int) -> int:
        return sum(count for each, count in self.together.items() if each >= size)


def metered(run) -> tuple[object, Meter]:
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive, together, allocated, total, peak = Counter(), Counter(), Counter(), 0, 0
    for change in (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())):
        total += change
        peak = max(peak, total)
        alive[abs(change)] += 1 if change > 0 else -1
        together[abs(change)] = max(together[abs(change)], alive[abs(change)])
        allocated[change] += 1
    return result, Meter(peak, together, allocated)
