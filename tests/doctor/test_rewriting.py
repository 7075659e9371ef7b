"""New folders with other ties: the values of the live functions, the same shards, dtypes and other files."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM

from hf_tying import TyingConfig, TyingError, assert_tied, tie, tying_report
from hf_tying.doctor import diagnose, new_folder, rewrite
from hf_tying.doctor.comparing import compare
from hf_tying.doctor.rewriting import UndecidedError
from hf_tying.report import file_values
from hf_tying.report.checkpoint import read_checkpoint
from hf_tying.report.opening import open_source

from ..tiny import logits, shared_names, tiny_model, untied_model
from . import planted


def loaded(folder, auto=AutoModelForCausalLM):
    return auto.from_pretrained(folder)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("keep", ["target", "output"])
def test_a_model_is_tied_on_disk_as_by_tie(arch, keep, tmp_path):
    untied = untied_model(arch)
    untied.save_pretrained(tmp_path / "untied")
    rewrite(tmp_path / "untied", tmp_path / "tied", "two_way", init_from=keep)
    model = loaded(tmp_path / "tied")
    source = untied.get_input_embeddings() if keep == "target" else untied.get_output_embeddings()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, source.weight)
    assert_tied(model)
    assert diagnose(tmp_path / "tied") == []


def test_values_that_differ_need_a_choice_and_nothing_is_written(tmp_path):
    untied_model("llama").save_pretrained(tmp_path / "untied")
    with pytest.raises(UndecidedError, match="--init-from"):
        rewrite(tmp_path / "untied", tmp_path / "tied", "two_way")
    assert [path.name for path in tmp_path.iterdir()] == ["untied"]


@pytest.mark.parametrize("choice", ["targt", "source", "lm_head", "model.norm.weight"])
def test_a_choice_that_there_is_not_is_named(choice, tmp_path):
    planted.equal_and_untied(tmp_path / "untied")
    with pytest.raises(TyingError, match=f"--init-from '{choice}'.*role .output, target."):
        rewrite(tmp_path / "untied", tmp_path / "tied", "two_way", init_from=choice)


def test_the_evidence_is_of_the_names_that_differ(tmp_path):
    """Of three names the last has the values of the first."""
    untied_model("bart").save_pretrained(tmp_path / "untied")
    names = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", planted.HEAD]
    first = planted.tensor(tmp_path / "untied", names[0])
    planted.rewrite(tmp_path / "untied", **{names[1]: first + 1, names[2]: first.clone()})
    with pytest.raises(UndecidedError, match="64 of 64 rows differ, largest difference 1"):
        rewrite(tmp_path / "untied", tmp_path / "tied", "three_way")


def test_every_byte_is_compared_before_a_matrix_is_given_up(tmp_path, monkeypatch):
    """A row between the samples in which a large matrix is compared for a report."""
    planted.one_row(tmp_path / "model")
    monkeypatch.setattr(file_values, "WHOLE", 100)
    monkeypatch.setattr(file_values, "_SAMPLE", 8)
    monkeypatch.setattr(file_values, "_SAMPLES", 2)
    assert tying_report(tmp_path / "model").groups[0].compared == "samples" and tying_report(tmp_path / "model").ok
    with pytest.raises(UndecidedError):
        rewrite(tmp_path / "model", tmp_path / "new", "dedup")
    planted.tied(tmp_path / "other")
    assert planted.HEAD in [each["name"] for each in compare(tmp_path / "model", tmp_path / "other")]


def test_equal_numbers_of_two_dtypes_need_no_choice(tmp_path):
    planted.other_dtype(tmp_path / "model")
    rewrite(tmp_path / "model", tmp_path / "new", "dedup")
    assert diagnose(tmp_path / "new") == []


def test_a_merged_projection_computes_the_same_without_the_package(tmp_path):
    planted.projection(tmp_path / "model")
    done = rewrite(tmp_path / "model", tmp_path / "merged", "merged")
    before, after = loaded(tmp_path / "model"), loaded(tmp_path / "merged")
    torch.testing.assert_close(logits(after), logits(before))
    assert type(after.lm_head) is torch.nn.Linear and diagnose(tmp_path / "merged") == []
    assert done.ties == {} and done.files == ["model.safetensors"]
    assert done.parameters[1] == sum(parameter.numel() for parameter in after.parameters())
    assert done.bytes[1] == 4 * done.parameters[1]


def test_a_model_that_transformers_cannot_load_is_said_and_not_written(tmp_path, monkeypatch):
    planted.tied(tmp_path / "model")

    def missing(*args, **kwargs):
        raise ImportError("a library is missing")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", missing)
    with pytest.raises(TyingError, match="does not load as it should .ImportError: a library is missing"):
        rewrite(tmp_path / "model", tmp_path / "new", "none")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("scheme", ["three_way", "source_target", "two_way"])
def test_bart_under_each_scheme(scheme, tmp_path):
    untied_model("bart").save_pretrained(tmp_path / "untied")
    rewrite(tmp_path / "untied", tmp_path / "tied", scheme, init_from="target")
    model = loaded(tmp_path / "tied", AutoModelForSeq2SeqLM)
    assert tying_report(model).scheme == scheme
    assert_tied(model)


@pytest.mark.parametrize("to", ["two_way", "source_target", "three_way"])
@pytest.mark.parametrize("held", ["two_way", "source_target", "three_way"])
@pytest.mark.parametrize("arch", ["bart", "t5"])
def test_a_tie_that_a_file_has_once_becomes_another_one_as_by_tie(arch, held, to, tmp_path):
    """The file leaves out names of the old tie, whose values the new one may keep."""
    made, keep = ("source" if scheme == "source_target" else "target" for scheme in (held, to))
    tie(untied_model(arch), TyingConfig(held, save_format="dedup"), init_from=made).save_pretrained(tmp_path / "held")
    rewrite(tmp_path / "held", tmp_path / "out", to, init_from=keep)
    expected = tie(loaded(tmp_path / "held", AutoModelForSeq2SeqLM), to, init_from=keep)
    model = loaded(tmp_path / "out", AutoModelForSeq2SeqLM)
    assert shared_names(model) == shared_names(expected)
    values = dict(model.named_parameters())
    assert all(torch.equal(values[name], value) for name, value in expected.named_parameters())


@pytest.mark.parametrize("plant", ["tied", "held"])
def test_an_untied_model_computes_the_same_with_a_matrix_for_each_name(plant, tmp_path):
    getattr(planted, plant)(tmp_path / "tied")
    rewrite(tmp_path / "tied", tmp_path / "untied", "none")
    before, after = loaded(tmp_path / "tied"), loaded(tmp_path / "untied")
    assert shared_names(before) and not shared_names(after)
    assert torch.equal(logits(before), logits(after))
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False


def test_untie_keeps_both_values_of_a_broken_tie(tmp_path):
    planted.two_matrices(tmp_path / "broken")
    rewrite(tmp_path / "broken", tmp_path / "untied", "none")
    old, new = (load_file(tmp_path / kind / "model.safetensors") for kind in ("broken", "untied"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert diagnose(tmp_path / "untied") == []


@pytest.mark.parametrize("form, names", [("portable", 2), ("dedup", 1)])
def test_a_form_of_file_has_as_many_names(form, names, tmp_path):
    planted.written_twice(tmp_path / "model")
    rewrite(tmp_path / "model", tmp_path / "new", form)
    held = load_file(tmp_path / "new" / "model.safetensors")
    assert len({planted.EMBEDDING, planted.HEAD} & held.keys()) == names
    assert torch.equal(logits(loaded(tmp_path / "model")), logits(loaded(tmp_path / "new")))


def test_shards_dtypes_and_other_files_are_kept(tmp_path):
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="3KB")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "more").mkdir()
    (tmp_path / "model" / "more" / "notes.txt").write_text("kept")
    shards = {path.name for path in (tmp_path / "model").glob("*.safetensors")}
    (tmp_path / "model" / "more" / "optimizer.pt").write_text("left out")
    done = rewrite(tmp_path / "model", tmp_path / "new", "two_way", init_from="target")
    assert done.left_out == ["more/optimizer.pt"] and not (tmp_path / "new" / "more" / "optimizer.pt").exists()
    assert {path.name for path in (tmp_path / "new").glob("*.safetensors")} <= shards and len(shards) > 2
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "new" / "more" / "notes.txt").read_text() == "kept"
    assert {t.dtype for p in (tmp_path / "new").glob("*.safetensors") for t in load_file(p).values()} == {
        torch.bfloat16
    }


def test_a_file_is_the_one_that_safetensors_writes_and_is_written_in_pieces(tmp_path, monkeypatch):
    planted.tied(tmp_path / "model")
    planted.rewrite(
        tmp_path / "model", **{"é": torch.zeros(0, 3), "one": torch.tensor(5), "half": torch.ones(9).half()}
    )
    checkpoint, most = read_checkpoint(open_source(tmp_path / "model")), []
    monkeypatch.setattr(new_folder, "_PIECE", 100)
    read = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda name, at, n: most.append(n) or read(name, at, n))
    new_folder._write_file(checkpoint, {name: name for name in checkpoint.tensors}, tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert max(most) == 100


def test_shards_are_loaded_whole_where_they_are_small(tmp_path, monkeypatch):
    planted.tied(tmp_path / "one")
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "many", max_shard_size="3KB")
    loads = []
    monkeypatch.setattr("hf_tying.ties.verify.problems", lambda model: loads.append(model) or [])
    monkeypatch.setattr(new_folder, "_SHARDS_LOADED_WHOLE", 2**12)
    for name, loaded_whole in (("one", True), ("many", False)):
        rewrite(tmp_path / name, tmp_path / f"{name} untied", "none")
        assert bool(loads) is loaded_whole
        loads.clear()


def test_a_pickle_becomes_safetensors(tmp_path):
    planted.pickle(tmp_path / "model")
    rewrite(tmp_path / "model", tmp_path / "new", "dedup")
    assert [path.name for path in (tmp_path / "new").glob("*model*")] == ["model.safetensors"]
    assert torch.equal(logits(loaded(tmp_path / "model")), logits(loaded(tmp_path / "new")))


def test_a_dry_run_says_what_would_change_and_writes_nothing(tmp_path):
    planted.tied(tmp_path / "model")
    done = rewrite(tmp_path / "model", tmp_path / "new", "none", dry_run=True)
    assert (
        done.changes[0] == ("tie_word_embeddings", True, False) and done.parameters[1] - done.parameters[0] == 64 * 16
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("to", ["none", "merged"])
@pytest.mark.parametrize("fault", ["not empty", "no parent", "fails"])
def test_nothing_half_written_is_left(fault, to, tmp_path, monkeypatch):
    planted.projection(tmp_path / "model") if to == "merged" else planted.tied(tmp_path / "model")
    out = tmp_path / "new"
    if fault == "not empty":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif fault == "no parent":
        out = tmp_path / "away" / "new"
    else:
        monkeypatch.setattr("hf_tying.doctor.new_folder._load_problems", lambda folder, written: iter(["a fault"]))
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(TyingError, match="a fault" if fault == "fails" else "new"):
        rewrite(tmp_path / "model", out, to)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("arch", ["marian", "gpt_neox", "llava", "t5", "bert"])
def test_a_class_with_names_and_tensors_of_its_own_is_untied_and_compared(arch, tmp_path):
    model = tiny_model(arch, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    rewrite(tmp_path / "tied", tmp_path / "untied", "none")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "untied").eval()), logits(model.eval()))
    assert {each["what"] for each in compare(tmp_path / "tied", tmp_path / "untied")} == {"config", "tie"}


@pytest.mark.parametrize("to", ["none", "two_way"])
def test_a_class_whose_ties_are_not_known_is_refused(to, tmp_path):
    planted.tied(tmp_path / "model")
    planted.edit(tmp_path / "model", architectures=["HouseModel"])
    with pytest.raises(TyingError, match=r"no HouseModel, .* untie\(model\)"):
        rewrite(tmp_path / "model", tmp_path / "new", to)


def test_compare_knows_one_matrix_under_several_names(tmp_path):
    planted.tied(tmp_path / "a")
    rewrite(tmp_path / "a", tmp_path / "b", "none")
    assert compare(tmp_path / "a", tmp_path / "a") == []
    assert {each["what"] for each in compare(tmp_path / "a", tmp_path / "b")} == {"config", "tie"}
    planted.one_row(tmp_path / "c")
    (found,) = (each for each in compare(tmp_path / "a", tmp_path / "c") if each["what"] == "values")
    assert (found["name"], found["rows"], found["of"]) == (planted.HEAD, 1, 64)
