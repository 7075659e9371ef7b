"""`diagnose`: the numbers of a model and its untied twin, alone and in a Trainer's logs."""

import pytest
import torch

from hf_tying import TyingCallback, TyingError, tie, untie
from hf_tying.diagnostics import alignment, diagnose, effective_rank, gradient_shares

from ..forms import matrix, tied_model
from ..tiny import tiny_model
from ..training.test_schedules import trainer
from .test_geometry import rotation


@pytest.fixture
def twin():
    return tiny_model("gpt2", seed=7, tie_word_embeddings=False)


def test_a_diagnosis_has_the_numbers_of_each_pair_of_matrices(model, twin):
    report = diagnose(model, twin, neighbours=5)
    (held,) = report.matrices
    assert held.name == "embeddings" and held.roles == ["target", "output"] and held.shape == [64, 16]
    for role in ("target", "output"):
        assert held.alignment[role] == alignment(matrix(model, role), matrix(twin, role), neighbours=5)
        assert report.twin_effective_rank[role] == effective_rank(matrix(twin, role))
    assert held.effective_rank == effective_rank(matrix(model, "output"))
    assert held.alignment["target"] != held.alignment["output"]


def test_the_matrix_is_found_to_be_the_twins_output_where_it_is(model, twin):
    with torch.no_grad():
        twin.lm_head.weight.copy_(matrix(model, "output") @ rotation(16).float())
    aligned = diagnose(model, twin).matrices[0].alignment
    assert aligned["output"].cosine == pytest.approx(1, abs=1e-5) and aligned["target"].cosine < 0.9


def test_the_diagnosis_of_an_untied_model_has_a_row_for_each_role(model, twin):
    report = diagnose(untie(model), twin)
    assert [(m.name, m.roles) for m in report.matrices] == [("target", ["target"]), ("output", ["output"])]


def test_a_diagnosis_can_be_of_three_roles(form):
    model = tied_model(form, "bart", "three_way")
    report = diagnose(model, untie(tied_model(form, "bart", "three_way")))
    assert list(report.matrices[0].alignment) == ["source", "target", "output"]


def test_gradient_shares_of_a_diagnosis_are_the_means_over_the_logs(model):
    history = [
        {"step": 1, "loss": 2.0, "grad_share/embeddings/target": 0.2, "grad_share/embeddings/output": 0.8},
        {"step": 2, "eval_loss": 2.0},
        {"step": 3, "loss": 2.0, "grad_share/embeddings/target": 0.4, "grad_share/embeddings/output": 0.6},
    ]
    report = diagnose(model, history=history)
    assert report.matrices[0].gradient_share == pytest.approx({"target": 0.3, "output": 0.7})
    assert report.history["embeddings/target"] == gradient_shares(history)["embeddings/target"]
    assert report.history["embeddings/target"] == [(1, 0.2), (3, 0.4)]


def test_a_diagnosis_is_read_as_a_table_a_dict_and_a_picture(model, twin, tmp_path):
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


def test_a_twin_that_does_not_fit_is_told(model, twin):
    with pytest.raises(TyingError, match="'embeddings' .target and output. is tied itself"):
        diagnose(model, model)
    with pytest.raises(TyingError, match=r"rows: expected one vocabulary"):
        diagnose(model, tiny_model("gpt2", tie_word_embeddings=False, vocab_size=60))
    with pytest.raises(TyingError, match="a Linear: expected a transformers PreTrainedModel"):
        diagnose(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("every, logged", [(None, [1, 2, 3, 4]), (2, [2, 4])])
def test_the_logs_have_the_numbers_of_the_matrices_at_that_step(model, twin, tmp_path, every, logged):
    run = trainer(model, tmp_path, TyingCallback(diagnose_with=twin, diagnose_steps=every), steps=4)
    run.train()
    logs = [entry for entry in run.state.log_history if "alignment/embeddings/target" in entry]
    assert [entry["step"] for entry in logs] == logged
    for name, value in diagnose(model, twin).to_logs().items():
        assert logs[-1][name] == value
    assert logs[-1].keys() >= {f"{k}/embeddings/output" for k in ("alignment", "neighbours")}
    assert logs[0]["effective_rank/embeddings"] != logs[-1]["effective_rank/embeddings"]


def test_a_twin_that_does_not_fit_stops_the_training_before_its_first_step(model, tmp_path):
    tied = tie(tiny_model("gpt2", tie_word_embeddings=False), "two_way", init_from="output")
    run = trainer(model, tmp_path, TyingCallback(diagnose_with=tied))
    with pytest.raises(TyingError, match="is tied itself"):
        run.train()
    assert run.state.global_step == 0


def test_after_an_untying_the_logs_have_numbers_for_each_matrix(model, twin, tmp_path):
    run = trainer(model, tmp_path, TyingCallback(diagnose_with=twin, untie_at=1), steps=3)
    run.train()
    last = [entry for entry in run.state.log_history if "loss" in entry][-1]
    assert {"alignment/target/output", "alignment/output/output"} <= last.keys()
