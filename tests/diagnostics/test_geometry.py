"""Alignment and effective rank: known cases, plain torch, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_tying.diagnostics import alignment, effective_rank


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]


@pytest.fixture
def words() -> torch.Tensor:
    return torch.randn(200, 8, dtype=torch.float64)


def test_a_rotated_scaled_and_shifted_matrix_is_aligned_wholly(words):
    found = alignment(words, 3 * words @ rotation(8) + 0.5)
    assert found.cosine == pytest.approx(1.0, abs=1e-12)
    assert alignment(words, 3 * words @ rotation(8)).neighbours == 1.0


def test_a_linear_map_is_found_by_the_linear_method_alone(words):
    mapped = words @ torch.randn(8, 5, dtype=torch.float64)
    assert alignment(words, mapped, method="linear").cosine == pytest.approx(1.0, abs=1e-12)
    square = words @ torch.diag(torch.logspace(-2, 2, 8, dtype=torch.float64))
    assert alignment(words, square, method="linear").cosine == pytest.approx(1.0, abs=1e-9)
    assert alignment(words, square).cosine < 0.9


@pytest.mark.parametrize("method", ["procrustes", "linear"])
def test_unrelated_matrices_are_near_chance(method):
    a, b = torch.randn(2, 3000, 8, dtype=torch.float64)
    found = alignment(a, b, method=method)
    assert abs(found.cosine) < 0.08  # a fit to noise explains sqrt(D / V) = 0.05 of it
    assert abs(found.neighbours - 10 / 2999) < 0.002


def test_alignment_is_its_plain_definition(words):
    words = words[:60]
    other = words @ rotation(8) + torch.randn(60, 8, dtype=torch.float64)
    a, b = words - words.mean(0), other - other.mean(0)
    u, _, vh = torch.linalg.svd(a.T @ b)
    found = alignment(words, other, neighbours=4)
    assert found.cosine == pytest.approx(F.cosine_similarity(a @ u @ vh, b).mean().item(), abs=1e-12)
    linear = torch.linalg.lstsq(a, b).solution
    expected = F.cosine_similarity(a @ linear, b).mean().item()
    assert alignment(words, other, method="linear").cosine == pytest.approx(expected, abs=1e-10)
    common = 0
    for i in range(60):
        near = []
        for held in (words, other):
            nearness = {j: F.cosine_similarity(held[i], held[j], dim=0).item() for j in range(60) if j != i}
            near.append(set(sorted(nearness, key=nearness.get)[-4:]))
        common += len(near[0] & near[1])
    assert found.neighbours == pytest.approx(common / 240, abs=1e-12)


def test_neighbours_are_counted_the_same_in_blocks(words, monkeypatch):
    other = words + torch.randn(200, 8, dtype=torch.float64)
    whole = alignment(words, other)
    monkeypatch.setattr("hf_tying.diagnostics.geometry._BLOCK", 7 * 200)
    assert alignment(words, other) == whole


def test_no_rotation_or_scale_of_either_matrix_changes_the_alignment(words):
    other = words + torch.randn(200, 8, dtype=torch.float64)
    one, two = alignment(words, other), alignment(0.1 * words @ rotation(8), 7 * other @ rotation(8))
    assert two.cosine == pytest.approx(one.cosine, abs=1e-10) and two.neighbours == one.neighbours


def test_rows_that_are_zero_are_left_out_of_the_alignment(words):
    padded = torch.cat([words, torch.zeros(3, 8, dtype=torch.float64)])
    other = torch.cat([words @ rotation(8), torch.ones(3, 8, dtype=torch.float64)])
    found = alignment(padded, other)
    assert found.cosine == pytest.approx(1.0, abs=1e-12) and found.neighbours == 1.0


def test_only_the_rows_asked_for_are_aligned(words):
    other = words @ rotation(8)
    other[100:] = torch.randn(100, 8, dtype=torch.float64)
    assert alignment(words, other, rows=torch.arange(100)).cosine == pytest.approx(1.0, abs=1e-12)
    assert alignment(words, other).cosine < 0.95


def test_a_sample_of_neighbours_is_the_same_each_time_and_leaves_torchs_generator_alone(words):
    other = words + torch.randn(200, 8, dtype=torch.float64)
    state = torch.random.get_rng_state()
    found = [alignment(words, other, sample=50, seed=seed).neighbours for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found[0] == found[1] and len(set(found)) > 1


def test_half_precision_and_gradients_are_no_obstacle_to_an_alignment(words):
    held = torch.nn.Parameter(words.to(torch.bfloat16))
    assert alignment(held, held).cosine == pytest.approx(1.0, abs=1e-9)


def test_a_matrix_that_is_not_finite_has_an_alignment_of_nan(words):
    broken = words.clone()
    broken[3, 3] = math.inf
    assert math.isnan(alignment(words, broken).cosine) and math.isnan(alignment(broken, words).neighbours)


@pytest.mark.parametrize("arguments, message", [
    (dict(b=torch.ones(199, 8)), "a row for the same words"), (dict(b=torch.ones(200)), "two matrices"),
    (dict(b=torch.ones(200, 4)), "method='linear'"), (dict(method="cca"), "Unknown method 'cca'"),
    (dict(neighbours=0), "neighbours=0"), (dict(neighbours=True), "neighbours=True"),
    (dict(neighbours=200), "200 rows to compare"), (dict(sample=10), "10 rows to compare"),
    (dict(b=torch.zeros(200, 8)), "0 rows to compare"),
])  # fmt: skip
def test_matrices_and_options_that_do_not_fit_an_alignment_are_told(words, arguments, message):
    with pytest.raises(ValueError, match=message):
        alignment(words, **{"b": words, **arguments})


def test_effective_rank_is_its_plain_definition_for_either_shape(words):
    values = torch.linalg.svdvals(words)
    shares = values / values.sum()
    expected = (-(shares * shares.log()).sum()).exp().item()
    assert effective_rank(words) == pytest.approx(expected, rel=1e-9)
    assert effective_rank(words.T) == pytest.approx(expected, rel=1e-9)
    assert 1 < expected < 8


def test_matrices_of_known_rank_have_that_effective_rank():
    assert effective_rank(torch.eye(12)) == pytest.approx(12, abs=1e-9)
    assert effective_rank(torch.randn(50, 1) @ torch.randn(1, 16)) == pytest.approx(1, abs=1e-4)
    exact = torch.outer(torch.arange(1.0, 51), torch.arange(1.0, 17)).double()
    assert effective_rank(exact) == pytest.approx(1, abs=1e-12)
    assert effective_rank(torch.eye(30)[:, :4]) == pytest.approx(4, abs=1e-9)


def test_no_rotation_or_scale_changes_the_effective_rank(words):
    assert effective_rank(1e-200 * words @ rotation(8)) == pytest.approx(effective_rank(words), rel=1e-9)


def test_zeros_nothing_and_infinity_have_a_defined_effective_rank():
    assert effective_rank(torch.zeros(5, 3)) == 0.0
    assert effective_rank(torch.zeros(0, 3)) == 0.0
    assert math.isnan(effective_rank(torch.full((5, 3), math.nan)))
    with pytest.raises(ValueError, match="Expected a matrix"):
        effective_rank(torch.ones(3))
