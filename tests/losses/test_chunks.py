"""The plan of a walk: what is cut, and what is kept."""

import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st

from hf_tying.losses import chunks, tied_cross_entropy, tied_log_probs

from .helpers import exactly, results, steady, watched, worst


@st.composite
def shapes(draw) -> dict:
    exact = draw(st.sampled_from([4, 8]))
    gradients = draw(st.booleans())
    return {
        "tokens": draw(st.sampled_from([0, 1, 191, 192, 193, 400]) | st.integers(0, 70_000)),
        "width": draw(st.sampled_from([1, 64, 768]) | st.integers(1, 5000)),
        "vocabulary": draw(st.sampled_from([1, 127, 128, 129, 50257]) | st.integers(1, 300_000)),
        "itemsize": draw(st.sampled_from([2, exact])),
        "exact_itemsize": exact,
        "budget": draw(st.sampled_from([0, 1, 2**20, 2**26]) | st.integers(0, 2**32)),
        "gradients": gradients,
        "matrix_gradient": gradients and draw(st.booleans()),
        "device": draw(st.sampled_from(["cpu", "cuda"])),
    }


def covers(slices, stop: int) -> bool:
    ends = [0, *(part.stop for part in slices)]
    return ends[-1] == stop and all(s.start == e < s.stop for s, e in zip(slices, ends, strict=False))


@steady(300)
@given(shapes())
@example({"tokens": 26178, "width": 4054, "vocabulary": 207327, "itemsize": 4, "exact_itemsize": 4,
          "budget": 217732848, "gradients": True, "matrix_gradient": True, "device": "cpu"})  # fmt: skip
def test_a_plan_covers_all_tokens_and_words_once_and_keeps_to_its_budget(shape):
    half, budget, exact = shape["itemsize"] == 2, shape["budget"], shape["exact_itemsize"]
    plan = chunks.plan_chunks(**shape, accumulates=not half)
    assert covers(plan.tokens, shape["tokens"]) and covers(plan.blocks, shape["vocabulary"])
    rows = chunks.row_length(max((part.stop - part.start for part in plan.tokens), default=0))
    at_work = plan.longest_block * exact
    if budget >= 2 * rows * min(chunks._NARROWEST, shape["vocabulary"]) * exact:
        assert plan.buffer * shape["itemsize"] + at_work <= budget
    else:  # a block of the fewest words, and whatever is left
        assert at_work <= max(rows * chunks._NARROWEST * exact, 2)
        assert plan.buffer * shape["itemsize"] <= budget
    assert at_work <= max(64 * 2**20, rows * chunks._NARROWEST * exact)
    if not shape["gradients"]:
        assert plan.buffer == 0
        assert at_work <= max(budget // 2, chunks._NARROWEST * exact)  # however many the tokens are
        return
    event(f"{min(len(plan.tokens), 3)} chunks")
    if half:
        assert len(plan.tokens) <= 1
    if len(plan.tokens) > 1:
        first, *others = (part.stop - part.start for part in plan.tokens)
        assert first >= chunks.FEWEST_ROWS
        assert len(others) == 1 or min(others) >= chunks.FEWEST_ROWS // 2  # of an even split
        # Cut only where it saves computing: all values have a place.
        own = shape["width"] if shape["matrix_gradient"] else 0
        assert (first - own) * shape["vocabulary"] <= plan.buffer
        assert max(others) * shape["vocabulary"] <= 1.05 * plan.buffer


@pytest.mark.parametrize("matrix_gradient", [True, False])
def test_tokens_are_cut_where_their_values_do_not_fit_and_not_into_too_few_rows(matrix_gradient):
    shape = {"width": 64, "vocabulary": 8000, "itemsize": 4, "exact_itemsize": 4, "gradients": True, "device": "cpu"}

    def plan(budget, accumulates):
        return chunks.plan_chunks(
            2000, **shape, budget=budget, matrix_gradient=matrix_gradient, accumulates=accumulates
        ).tokens

    budgets = [rows * 8000 * 4 for rows in range(0, 2400, 20)]
    cut = [budget for budget in budgets if len(plan(budget, True)) > 1]
    # From the first budget that has room for a chunk to the last that has none for all, without a gap.
    assert cut == [budget for budget in budgets if cut[0] <= budget <= cut[-1]]
    assert budgets[0] < cut[0] and cut[-1] < budgets[-1]
    at_work = chunks._AT_WORK["cpu"]
    copies = 3 * 2000 * 64 * 4 / 32_000  # of the hidden states, in rows of values
    assert chunks.FEWEST_ROWS <= (cut[0] - at_work) / 32_000 <= chunks.FEWEST_ROWS + 20 + copies
    assert 2000 - 64 - 20 <= (cut[-1] - at_work) / 32_000 <= 2000 + copies
    assert all(len(plan(budget, False)) == 1 for budget in budgets)
    counts = [len(plan(budget, True)) for budget in cut]
    assert counts == sorted(counts, reverse=True) and counts[0] >= 9 and counts[-1] == 2


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 400, 1023])
def test_rows_in_memory_are_whole_cache_lines_unless_they_are_short(tokens):
    memory = torch.arange(7 * 1100.0)
    block = chunks.block_in(memory, 7, tokens)
    assert block.shape == (7, tokens) and block.data_ptr() == memory.data_ptr()
    length, contiguous = block.stride()
    assert contiguous == 1 and tokens <= length < tokens + 16
    assert length % 16 == 0 if tokens >= 64 else length == tokens


@pytest.mark.parametrize("width", [4, 128])
@pytest.mark.parametrize("budget", [3_000, 60_000, 2**20])
def test_values_between_rows_are_not_read(width, budget):
    """97 tokens lie in rows of 112 elements: kept in the gradient's memory, in a buffer, or computed again."""
    hidden, weight, labels = torch.randn(97, width), torch.randn(300, width), torch.randint(300, (97,))
    with watched(at_work=2_000, narrowest=2, fewest_rows=70) as seen:
        found = results(tied_cross_entropy, hidden, weight, labels, memory_budget=budget)
    assert seen["words cut"]
    assert worst(found, exactly(hidden, weight, labels)) < 2e-6
    log_probs = tied_log_probs(hidden.double(), weight.double(), labels, outputs=("log_probs",)).log_probs
    whole = (hidden.double() @ weight.double().T).log_softmax(-1)
    torch.testing.assert_close(log_probs, whole[torch.arange(97), labels])
