"""f19: each translation model works tied by each scheme, with one or two vocabularies, or an error says why not.

The table: every stock translation model and three joined ones x every scheme x one or two vocabularies. What works in
each cell: gradient, step, files, other processes, resize, beams.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from hf_tying import TyingError, assert_tied, tie, untie
from hf_tying.config import SCHEMES as MEMBERS
from hf_tying.ties.anatomy import roles

from ..forms import matrices
from ..processes import run_python
from ..tiny import shared_names, split
from ..tiny_translation import (
    JOINED,
    SCHEMES,
    STOCK,
    VOCAB,
    beams,
    nearly_equal,
    translation_inputs,
    translation_logits,
    translation_model,
    translation_step,
)

ALL = STOCK + JOINED
#: Those that can have a vocabulary of another size on the target side.
TWO_VOCABULARIES = ["marian_separate", "fsmt", *JOINED]

every_model = pytest.mark.parametrize("arch", ALL)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
joins_sides = pytest.mark.parametrize("scheme", ["source_target", "three_way"])


def untied(arch: str, **kwargs) -> PreTrainedModel:
    """The stock model with a matrix of its own, of other values, in each role (and for BERT one output bias)."""
    model = translation_model(arch, **kwargs)
    names = roles(model)
    generator = torch.Generator().manual_seed(1)
    for role in ("target", "output"):
        split(model, names[role].names)
        with torch.no_grad():
            parameter = model.get_parameter(names[role].name)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return untie(model)


def tied(arch: str, scheme: str) -> PreTrainedModel:
    """The same, tied by `scheme`."""
    return tie(untied(arch), scheme, init_from=None if scheme == "none" else MEMBERS[scheme][0])


@every_scheme
@every_model
def test_exactly_the_roles_of_the_scheme_are_one_parameter(arch, scheme):
    model = tied(arch, scheme)
    assert_tied(model)
    held = matrices(model)
    assert set(held) == {"source", "target", "output"}
    for first in held:
        for second in held:
            together = first == second or {first, second} <= set(MEMBERS[scheme])
            assert (held[first] is held[second]) == together, (first, second)
    # No matrix that only carries another one is left over: it would be a dead parameter.
    used = {id(p) for p in held.values()}
    words = ("shared", "embed_tokens", "word_embeddings", "wte", "lm_head.weight", "output_projection")
    others = [n for n, p in model.named_parameters() if any(w in n for w in words) and id(p) not in used]
    assert others == []
    assert len(shared_names(model)) == len(model.tie_groups)
    assert model.config.tying["scheme"] == scheme


@every_scheme
@every_model
def test_the_gradient_is_the_sum_of_what_each_use_gives_and_a_step_keeps_the_tie(arch, scheme):
    model = tied(arch, scheme)
    twin = tied(arch, scheme)
    for names in shared_names(twin):
        split(twin, names)  # by plain torch: every name alone, with the same values
    stock = next(
        cls for cls in type(twin).__mro__ if cls.__module__.startswith("transformers.") and cls is not type(twin)
    )
    twin.__class__ = stock
    for each in (model, twin):
        each.eval()
        each(**translation_inputs(each)).loss.backward()
    alone = {name: p.grad for name, p in twin.named_parameters(remove_duplicate=False)}
    for group in model.tie_groups:
        parts = [alone[name] for name in group.names if alone[name] is not None]
        grad = model.get_parameter(group.root).grad
        torch.testing.assert_close(grad, sum(parts), rtol=1e-5, atol=1e-6)
    for role in MEMBERS[scheme]:
        assert alone[roles(model)[role].name].abs().max() > 0, role  # each use has its part in the sum
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad and _is_used(model, p))
    before = {role: p.detach().clone() for role, p in matrices(model).items()}
    translation_step(model)
    assert_tied(model)
    assert all(not torch.equal(p, before[role]) for role, p in matrices(model).items())


def _is_used(model, parameter) -> bool:
    """Not the pooler of BERT nor experts that no token was sent to."""
    return any(parameter is p for p in matrices(model).values())


@pytest.mark.parametrize("count, padding", [(VOCAB + 6, None), (VOCAB - 10, None), (VOCAB + 1, 8)])
@every_scheme
@every_model
def test_a_resize_keeps_every_row_and_every_tie_and_the_file_loads(arch, scheme, count, padding, tmp_path):
    model = tied(arch, scheme)
    before = {role: p.detach().clone() for role, p in matrices(model).items()}
    model.resize_token_embeddings(count, pad_to_multiple_of=padding)
    expected = count if padding is None else -(-count // padding) * padding
    assert_tied(model)
    # Marian with two vocabularies has a method for each, and this one is the source's.
    one = arch != "marian_separate" or {"source", "target"} <= set(MEMBERS[scheme])
    for role, matrix in matrices(model).items():
        assert matrix.shape[0] == (expected if one or role == "source" else VOCAB), role
        kept = min(VOCAB, matrix.shape[0])
        assert torch.equal(matrix[:kept], before[role][:kept]), role
    translation_step(model)
    if count > VOCAB:  # the inputs have ids up to 49
        beams(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert_tied(loaded)
    assert nearly_equal(translation_logits(loaded), translation_logits(model))


@pytest.mark.parametrize("scheme", ["none", "two_way"])
def test_marian_resizes_its_target_side_alone(scheme):
    model = tied("marian_separate", scheme)
    model.resize_decoder_token_embeddings(70)
    assert {role: p.shape[0] for role, p in matrices(model).items()} == {"source": 64, "target": 70, "output": 70}
    translation_step(model)
    assert_tied(model)


@joins_sides
def test_marian_tied_across_both_sides_resizes_both_by_either_method(scheme, tmp_path):
    model = tied("marian_separate", scheme)
    model.resize_decoder_token_embeddings(70)
    assert {p.shape[0] for p in matrices(model).values()} == {70}
    assert (model.config.vocab_size, model.config.decoder_vocab_size) == (70, 70)
    translation_step(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert_tied(loaded)
    assert nearly_equal(translation_logits(loaded), translation_logits(model))


# --- other processes -------------------------------------------------------------------------------------------------

WAYS = ("without the package", "with the package")
CHILD = """
import json, pathlib, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSeq2SeqLM
from transformers.utils import logging
torch.set_num_threads(1)
logging.disable_progress_bar()
logging.set_verbosity_error()
from tests.tiny import shared_names
from tests.tiny_translation import beams, translation_logits


def read_all(folders, out):
    values, told = {}, {}
    for folder in sorted(folders.iterdir()):
        model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
        values[f"{folder.name}.logits"], values[f"{folder.name}.beams"] = translation_logits(model), beams(model)
        told[folder.name] = {"missing": sorted(info["missing_keys"]), "shared": shared_names(model)}
        if "hf_tying" in sys.modules:
            hf_tying.assert_tied(model)
    save_file(values, out / "values.safetensors")
    (out / "told.json").write_text(json.dumps(told))


folders, without, with_it = map(pathlib.Path, sys.argv[1:])
read_all(folders, without)
assert "hf_tying" not in sys.modules
import hf_tying
read_all(folders, with_it)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> tuple[dict, dict, dict]:
    """What all models compute here, the names that they share, and by way the folder of what another process found."""
    expected, shared = {}, {}
    work, *out = (tmp_path_factory.mktemp(name.replace(" ", "_")) for name in ("work", *WAYS))
    for arch in ALL:
        for scheme in SCHEMES:
            model, name = tied(arch, scheme), f"{arch}-{scheme}"
            translation_step(model)
            model.save_pretrained(work / name)
            expected[f"{name}.logits"], expected[f"{name}.beams"] = translation_logits(model), beams(model)
            shared[name] = shared_names(model)
    run_python("-c", CHILD, work, *out)
    return expected, shared, dict(zip(WAYS, out, strict=True))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", WAYS)
def test_another_process_gives_the_same_logits_and_the_same_beams(way, elsewhere):
    expected, shared, folders = elsewhere
    found = load_file(folders[way] / "values.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not nearly_equal(found[name], expected[name])] == []
    if way == "with the package":
        told = json.loads((folders[way] / "told.json").read_text())
        assert told == {name: {"missing": [], "shared": names} for name, names in shared.items()}


# --- two vocabularies ------------------------------------------------------------------------------------------------


class Words:
    """As much of a tokenizer as a tie looks at."""

    def __init__(self, *words: str):
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


ENGLISH, GERMAN = Words("<pad>", "dog", "cat"), Words("<pad>", "Hund", "cat")


@every_scheme
@every_model
def test_equal_sizes_with_other_words_are_refused_where_both_sides_would_be_one(arch, scheme):
    model = untied(arch)
    before = {role: p for role, p in matrices(model).items()}
    how = {"init_from": None if scheme == "none" else MEMBERS[scheme][0], "tokenizer": ENGLISH}
    if {"source", "target"} <= set(MEMBERS[scheme]):
        with pytest.raises(TyingError, match="different vocabularies .*'Hund': None and 1"):
            tie(model, scheme, target_tokenizer=GERMAN, **how)
        assert all(matrices(model)[role] is p for role, p in before.items())
        tie(model, scheme, target_tokenizer=ENGLISH, **how)
    else:
        tie(model, scheme, target_tokenizer=GERMAN, **how)
    assert_tied(model)


def test_one_tokenizer_that_holds_two_vocabularies_is_compared_in_itself():
    class Marian(Words):
        separate_vocabs = True
        target_encoder = GERMAN.get_vocab()

    model = untied("marian_separate")
    with pytest.raises(TyingError, match="different vocabularies"):
        tie(model, "three_way", init_from="target", tokenizer=Marian(*ENGLISH.words))
    tie(model, "two_way", init_from="target", tokenizer=Marian(*ENGLISH.words))


@every_scheme
@pytest.mark.parametrize("arch", TWO_VOCABULARIES)
def test_vocabularies_of_two_sizes_can_have_what_lies_on_one_side(arch, scheme, tmp_path):
    model = untied(arch, target_vocab=80)
    if {"source", "target"} <= set(MEMBERS[scheme]):
        with pytest.raises(TyingError, match=r"\((64|80), 16\).*\((64|80), 16\)"):
            tie(model, scheme, init_from="source")
        assert len({id(p) for p in matrices(model).values()}) == 3
        return
    tie(model, scheme, init_from=None if scheme == "none" else "target")
    assert {role: p.shape[0] for role, p in matrices(model).items()} == {"source": 64, "target": 80, "output": 80}
    translation_step(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert_tied(loaded)
    assert nearly_equal(translation_logits(loaded), translation_logits(model))
    assert torch.equal(beams(loaded), beams(model))


@pytest.mark.parametrize("arch", ["fsmt", *JOINED])
def test_a_resize_of_two_vocabularies_at_once_is_refused_whole(arch):
    model = untied(arch, target_vocab=80)
    before = translation_logits(model)
    with pytest.raises(TyingError, match="two vocabularies"):
        model.resize_token_embeddings(90)
    assert {p.shape[0] for p in matrices(model).values()} == {64, 80}
    assert torch.equal(translation_logits(model), before)


# --- what is each side's own -----------------------------------------------------------------------------------------


@every_model
def test_a_tie_changes_no_scale_no_bias_and_no_padding_index(arch):
    model = untied(arch)
    before = _own_life(model)
    tie(model, "three_way", init_from="source")
    assert _own_life(model) == before
    untie(model)
    assert _own_life(model) == before


def _own_life(model) -> dict:
    found = {f"{n}.bias": p.tolist() for n, m in model.named_modules() if (p := getattr(m, "bias", None)) is not None}
    for name, module in model.named_modules():
        for attribute in ("padding_idx", "embed_scale"):
            if hasattr(module, attribute):
                found[f"{name}.{attribute}"] = float(getattr(module, attribute) or -1)
    if hasattr(model, "final_logits_bias"):
        found["final_logits_bias"] = model.final_logits_bias.tolist()
    return found


@every_model
def test_untying_changes_no_logit(arch):
    model = tied(arch, "three_way")
    before = translation_logits(model)
    untie(model)
    assert torch.equal(translation_logits(model), before)
    for scheme in ("source_target", "two_way", "none"):
        tie(model, "three_way")
        tie(model, scheme)
        assert torch.equal(translation_logits(model), before), scheme


def test_the_padding_row_of_a_tied_matrix_learns_from_the_softmax_alone():
    model = tied("bart", "three_way")
    pad = model.config.pad_token_id
    assert model.get_encoder().embed_tokens.padding_idx == model.get_decoder().embed_tokens.padding_idx == pad
    inputs = translation_inputs(model)
    inputs["input_ids"][:, -2:] = pad
    inputs["attention_mask"][:, -2:] = 0
    hidden = model(**inputs, output_hidden_states=True).decoder_hidden_states[-1].detach().reshape(-1, 16)
    output = model(**inputs)
    output.loss.backward()
    probability = output.logits.detach().softmax(-1)[..., pad].reshape(-1, 1) / len(hidden)
    grad = model.get_parameter("lm_head.weight").grad[pad]
    torch.testing.assert_close(grad, (probability * hidden).sum(0), rtol=1e-4, atol=1e-6)
    assert grad.abs().max() > 0


def test_bart_with_the_flag_off_has_no_dead_matrix_and_every_parameter_gets_a_gradient():
    """The stock model keeps `shared`, which no layer reads: distributed training waits for its gradient."""
    stock = translation_model("bart", tie_word_embeddings=False)
    stock(**translation_inputs(stock)).loss.backward()
    assert [n for n, p in stock.named_parameters() if p.grad is None] == ["model.shared.weight"]
    for scheme in SCHEMES:
        model = tied("bart", scheme)
        model(**translation_inputs(model)).loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


# --- bad input -------------------------------------------------------------------------------------------------------


@joins_sides
@pytest.mark.parametrize("arch", ["gpt2", "bert"])
def test_a_model_with_one_side_has_no_such_scheme(arch, scheme):
    from ..tiny import tiny_model

    model = tiny_model(arch)
    with pytest.raises(TyingError, match="has no source.*Schemes it can have: none, two_way"):
        tie(model, scheme)
