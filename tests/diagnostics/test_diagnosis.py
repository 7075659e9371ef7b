"""Alignment, effective rank and gradient shares: known cases, plain torch, the report, and a Trainer's logs."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_tying import TyingCallback, TyingError, tie, untie
from hf_tying.diagnostics.diagnosis import alignment, diagnose, effective_rank, gradient_shares

from ..forms import matrix, tied_model
from ..tiny import tiny_model
from ..training.test_schedules import trainer


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]


@pytest.fixture
def words() -> torch.Tensor:
    return torch.randn(200, 8, dtype=torch.float64)


class TestAlignment:
    def test_a_rotated_scaled_and_shifted_matrix_is_aligned_wholly(self, words):
        found = alignment(words, 3 * words @ rotation(8) + 0.5)
        assert found.cosine == pytest.approx(1.0, abs=1e-12)
        assert alignment(words, 3 * words @ rotation(8)).neighbours == 1.0

    def test_a_linear_map_is_found_by_the_linear_method_alone(self, words):
        mapped = words @ torch.randn(8, 5, dtype=torch.float64)
        assert alignment(words, mapped, method="linear").cosine == pytest.approx(1.0, abs=1e-12)
        square = words @ torch.diag(torch.logspace(-2, 2, 8, dtype=torch.float64))
        assert alignment(words, square, method="linear").cosine == pytest.approx(1.0, abs=1e-9)
        assert alignment(words, square).cosine < 0.9

    @pytest.mark.parametrize("method", ["procrustes", "linear"])
    def test_unrelated_matrices_are_near_chance(self, method):
        a, b = torch.randn(2, 3000, 8, dtype=torch.float64)
        found = alignment(a, b, method=method)
        assert abs(found.cosine) < 0.08  # a fit to noise explains sqrt(D / V) = 0.05 of it
        assert abs(found.neighbours - 10 / 2999) < 0.002

    def test_it_is_the_plain_definition(self, words):
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

    def test_neighbours_are_counted_the_same_in_blocks(self, words, monkeypatch):
        other = words + torch.randn(200, 8, dtype=torch.float64)
        whole = alignment(words, other)
        monkeypatch.setattr("hf_tying.diagnostics.geometry._BLOCK", 7 * 200)
        assert alignment(words, other) == whole

    def test_no_rotation_or_scale_of_either_changes_it(self, words):
        other = words + torch.randn(200, 8, dtype=torch.float64)
        one, two = alignment(words, other), alignment(0.1 * words @ rotation(8), 7 * other @ rotation(8))
        assert two.cosine == pytest.approx(one.cosine, abs=1e-10) and two.neighbours == one.neighbours

    def test_rows_that_are_zero_are_left_out(self, words):
        padded = torch.cat([words, torch.zeros(3, 8, dtype=torch.float64)])
        other = torch.cat([words @ rotation(8), torch.ones(3, 8, dtype=torch.float64)])
        found = alignment(padded, other)
        assert found.cosine == pytest.approx(1.0, abs=1e-12) and found.neighbours == 1.0

    def test_only_the_rows_asked_for_are_compared(self, words):
        other = words @ rotation(8)
        other[100:] = torch.randn(100, 8, dtype=torch.float64)
        assert alignment(words, other, rows=torch.arange(100)).cosine == pytest.approx(1.0, abs=1e-12)
        assert alignment(words, other).cosine < 0.95

    def test_a_sample_is_the_same_each_time_and_leaves_torchs_generator_alone(self, words):
        other = words + torch.randn(200, 8, dtype=torch.float64)
        state = torch.random.get_rng_state()
        found = [alignment(words, other, sample=50, seed=seed).neighbours for seed in (0, 0, 1, 2, 3)]
        assert torch.equal(torch.random.get_rng_state(), state)
        assert found[0] == found[1] and len(set(found)) > 1

    def test_half_precision_and_gradients_are_no_obstacle(self, words):
        held = torch.nn.Parameter(words.to(torch.bfloat16))
        assert alignment(held, held).cosine == pytest.approx(1.0, abs=1e-9)

    def test_a_matrix_that_is_not_finite_gives_nan(self, words):
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
    def test_what_does_not_fit_is_told(self, words, arguments, message):
        with pytest.raises(ValueError, match=message):
            alignment(words, **{"b": words, **arguments})


class TestEffectiveRank:
    def test_it_is_the_plain_definition_for_either_shape(self, words):
        values = torch.linalg.svdvals(words)
        shares = values / values.sum()
        expected = (-(shares * shares.log()).sum()).exp().item()
        assert effective_rank(words) == pytest.approx(expected, rel=1e-9)
        assert effective_rank(words.T) == pytest.approx(expected, rel=1e-9)
        assert 1 < expected < 8

    def test_known_ranks(self):
        assert effective_rank(torch.eye(12)) == pytest.approx(12, abs=1e-9)
        assert effective_rank(torch.randn(50, 1) @ torch.randn(1, 16)) == pytest.approx(1, abs=1e-4)
        exact = torch.outer(torch.arange(1.0, 51), torch.arange(1.0, 17)).double()
        assert effective_rank(exact) == pytest.approx(1, abs=1e-12)
        assert effective_rank(torch.eye(30)[:, :4]) == pytest.approx(4, abs=1e-9)

    def test_no_rotation_or_scale_changes_it(self, words):
        assert effective_rank(1e-200 * words @ rotation(8)) == pytest.approx(effective_rank(words), rel=1e-9)

    def test_zeros_nothing_and_infinity_have_defined_values(self):
        assert effective_rank(torch.zeros(5, 3)) == 0.0
        assert effective_rank(torch.zeros(0, 3)) == 0.0
        assert math.isnan(effective_rank(torch.full((5, 3), math.nan)))
        with pytest.raises(ValueError, match="Expected a matrix"):
            effective_rank(torch.ones(3))


@pytest.fixture
def twin():
    return tiny_model("gpt2", seed=7, tie_word_embeddings=False)


class TestDiagnose:
    def test_it_has_the_numbers_of_each_pair(self, model, twin):
        report = diagnose(model, twin, neighbours=5)
        (held,) = report.matrices
        assert held.name == "embeddings" and held.roles == ["target", "output"] and held.shape == [64, 16]
        for role in ("target", "output"):
            assert held.alignment[role] == alignment(matrix(model, role), matrix(twin, role), neighbours=5)
            assert report.twin_effective_rank[role] == effective_rank(matrix(twin, role))
        assert held.effective_rank == effective_rank(matrix(model, "output"))
        assert held.alignment["target"] != held.alignment["output"]

    def test_the_matrix_is_found_to_be_the_twins_output_where_it_is(self, model, twin):
        with torch.no_grad():
            twin.lm_head.weight.copy_(matrix(model, "output") @ rotation(16).float())
        aligned = diagnose(model, twin).matrices[0].alignment
        assert aligned["output"].cosine == pytest.approx(1, abs=1e-5) and aligned["target"].cosine < 0.9

    def test_an_untied_model_has_a_row_for_each_role(self, model, twin):
        report = diagnose(untie(model), twin)
        assert [(m.name, m.roles) for m in report.matrices] == [("target", ["target"]), ("output", ["output"])]

    def test_of_three_roles_too(self, form):
        model = tied_model(form, "bart", "three_way")
        report = diagnose(model, untie(tied_model(form, "bart", "three_way")))
        assert list(report.matrices[0].alignment) == ["source", "target", "output"]

    def test_gradient_shares_are_the_means_over_the_logs(self, model):
        history = [
            {"step": 1, "loss": 2.0, "grad_share/embeddings/target": 0.2, "grad_share/embeddings/output": 0.8},
            {"step": 2, "eval_loss": 2.0},
            {"step": 3, "loss": 2.0, "grad_share/embeddings/target": 0.4, "grad_share/embeddings/output": 0.6},
        ]
        report = diagnose(model, history=history)
        assert report.matrices[0].gradient_share == pytest.approx({"target": 0.3, "output": 0.7})
        assert report.history["embeddings/target"] == gradient_shares(history)["embeddings/target"]
        assert report.history["embeddings/target"] == [(1, 0.2), (3, 0.4)]

    def test_as_a_table_a_dict_and_a_picture(self, model, twin, tmp_path):
        history = [{"step": i, "grad_share/embeddings/output": 0.7} for i in range(3)]
        report = diagnose(model, twin, history=history)
        text = report.to_table()
        assert "embeddings" in text and "0.700" in text
        assert f"{report.matrices[0].alignment['output'].cosine:.3f}" in text
        assert f"{report.twin_effective_rank['target']:.1f}" in text
        held = report.to_dict()
        assert held["matrices"][0]["alignment"]["target"]["cosine"] == report.matrices[0].alignment["target"].cosine
        for name, part in (("whole.svg", report), ("alone.png", diagnose(model))):
            file = part.plot(tmp_path / name)
            assert file.stat().st_size > 1000
        picture = (tmp_path / "whole.svg").read_text()
        assert all(title in picture for title in ("alignment to the untied twin", "effective rank", "share of the"))

    def test_a_twin_that_does_not_fit_is_told(self, model, twin):
        with pytest.raises(TyingError, match="'embeddings' .target and output. is tied itself"):
            diagnose(model, model)
        with pytest.raises(TyingError, match=r"rows: expected one vocabulary"):
            diagnose(model, tiny_model("gpt2", tie_word_embeddings=False, vocab_size=60))
        with pytest.raises(TyingError, match="Expected a PreTrainedModel"):
            diagnose(torch.nn.Linear(2, 2))


class TestInTheLogs:
    @pytest.mark.parametrize("every, logged", [(None, [1, 2, 3, 4]), (2, [2, 4])])
    def test_the_numbers_are_those_of_the_matrices_at_that_step(self, model, twin, tmp_path, every, logged):
        run = trainer(model, tmp_path, TyingCallback(diagnose_with=twin, diagnose_steps=every), steps=4)
        run.train()
        logs = [entry for entry in run.state.log_history if "alignment/embeddings/target" in entry]
        assert [entry["step"] for entry in logs] == logged
        for name, value in diagnose(model, twin).to_logs().items():
            assert logs[-1][name] == value
        assert logs[-1].keys() >= {f"{k}/embeddings/output" for k in ("alignment", "neighbours")}
        assert logs[0]["effective_rank/embeddings"] != logs[-1]["effective_rank/embeddings"]

    def test_a_twin_that_does_not_fit_stops_at_train_begin(self, model, tmp_path):
        tied = tie(tiny_model("gpt2", tie_word_embeddings=False), "two_way", init_from="output")
        run = trainer(model, tmp_path, TyingCallback(diagnose_with=tied))
        with pytest.raises(TyingError, match="is tied itself"):
            run.train()
        assert run.state.global_step == 0

    def test_after_an_untying_each_matrix_has_its_own_numbers(self, model, twin, tmp_path):
        run = trainer(model, tmp_path, TyingCallback(diagnose_with=twin, untie_at=1), steps=3)
        run.train()
        last = [entry for entry in run.state.log_history if "loss" in entry][-1]
        assert {"alignment/target/output", "alignment/output/output"} <= last.keys()
