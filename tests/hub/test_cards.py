"""Cards of models, made from their files: every number is that of a file, and what is written by hand stays."""

import json
import os
import re

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file

from hf_tying import TyingConfig, TyingError, share_layers, tie, use_projection
from hf_tying.hub import make_card
from hf_tying.hub.code_blocks import blocks_of, run_blocks
from hf_tying.hub.metadata import metadata_problems
from hf_tying.hub.sections import merge_sections, without_placeholders
from hf_tying.hub.tags import tags_of
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM, TiedLSTMForSequenceClassification
from hf_tying.ties.anatomy import Anatomy

from ..processes import run_script
from ..tied_lora import tied_lora
from ..tiny import ALL, COMPOSITE, SEQ2SEQ, layer_pair, logits, tiny_model, untied_model

SECTION = "<!-- hf_tying:ties -->\n## What is tied\n\n{}\n<!-- /hf_tying:ties -->"


def group_of_layers():
    model = tiny_model("qwen3")
    return tie(model, TyingConfig(groups={"mlp": layer_pair(model)}), init_from="mean")


MODELS = {
    "two_way": lambda: tie(untied_model("llama"), "two_way", init_from="target"),
    "three_way": lambda: tie(untied_model("bart"), "three_way", init_from="source"),
    "layers": group_of_layers,
    "projection": lambda: use_projection(tiny_model("gpt2")),
    "lstm": lambda: TiedLSTMForCausalLM(TiedLSTMConfig(vocab_size=64, hidden_size=16, embedding_size=16)),
    "classifier": lambda: TiedLSTMForSequenceClassification(TiedLSTMConfig(vocab_size=64, hidden_size=16)),
    "stock": lambda: tiny_model("llama", tie_word_embeddings=True),
    "untied": lambda: untied_model("llama"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        make().save_pretrained(root / name)
    return root


def card_of(folders, name: str, **facts) -> ModelCard:
    return make_card(folders / name, repo_id=f"me/{name}", save=False, **facts)


WORDS = ["model.embed_tokens.weight", "lm_head.weight"]


def relaxed(save_format=None):
    groups = {"words": {"names": WORDS, "relax": {"kind": "scale"}}}
    model = tie(untied_model("llama"), TyingConfig(groups=groups, save_format=save_format), init_from=WORDS[0])
    torch.nn.init.normal_(model.lm_head.weight_relaxation.offset)
    return model


@pytest.mark.parametrize(
    ("make", "summary", "outcome", "tag"),
    [
        (lambda: tie(untied_model("llama"), {"words": WORDS}, init_from=WORDS[0]),
         r"are \*\*one matrix\*\* \(two-way weight tying\)\.\n", "right values", "two_way"),
        (relaxed, r"\*\*one matrix with differences\*\* \(a relaxed tie\)\.\n", "right values", "relaxed"),
        (lambda: relaxed("dedup"), "a relaxed tie", "**wrong values**", "relaxed"),
        (lambda: share_layers(tiny_model("llama"), "all"), "in whose layers 9 groups", "right values", "groups"),
        (lambda: share_layers(tiny_model("llama"), "all", save_format="dedup"), "9 groups of", "an error", "groups"),
    ],
    ids=["a user's name", "relaxed", "relaxed dedup", "shared layers", "shared layers dedup"],
)  # fmt: skip
def test_a_card_says_what_stock_reads(make, summary, outcome, tag, tmp_path):
    model = make().eval()
    model.save_pretrained(tmp_path / "model")
    card = make_card(tmp_path / "model", save=False)
    text = card.text
    assert set(card.data.tags) == {"weight-tying", f"tying:{tag}"} == {*tags_of(model.config, Anatomy(model).role_of)}
    assert re.search(summary, text) and f"What you get without `hf_tying`: {outcome}" in text
    if outcome == "an error":
        with pytest.raises(OSError, match="no file named"):
            stock_of(tmp_path / "model", untied_model("llama"))
        return
    stock, _ = stock_of(tmp_path / "model", untied_model("llama"))
    assert torch.allclose(logits(stock), logits(model), atol=1e-5) == (outcome == "right values")


def stock_of(folder, model):
    """What plain transformers loads: the hook does nothing for a config whose `tying` entry is none."""
    config = json.loads((folder / "config.json").read_text()) | {"tying": None}
    (folder / "config.json").write_text(json.dumps(config))
    return type(model).from_pretrained(folder, output_loading_info=True)


#: Architectures, whether the matrices have equal values before they are tied, schemes and forms of the file.
TIES = {
    f"{arch}-{values}-{scheme}-{save_format or 'default'}": (arch, values, scheme, save_format)
    for arch in (ALL if os.environ.get("ZOO") else ("t5", "bart", "bert"))
    for values in ("equal", "different")
    for scheme in ("two_way", "none", *(("source_target",) if arch in SEQ2SEQ else ()))
    for save_format in (None, "dedup")
}


@pytest.fixture(scope="module")
def told_and_loaded(tmp_path_factory):
    """Of each model of `TIES`: its parameters and logits, its card, and what a process without hf_tying loads."""
    root, told = tmp_path_factory.mktemp("ties"), {}
    for name, (arch, values, scheme, save_format) in TIES.items():
        model = (tiny_model if values == "equal" else untied_model)(arch)
        init_from = "source" if scheme == "source_target" else "target"
        model = tie(model, TyingConfig(scheme, save_format=save_format), init_from=init_from)
        model.save_pretrained(root / name)
        held = sum(parameter.numel() for parameter in model.parameters())
        numbers = [] if arch in COMPOSITE else logits(model).flatten().tolist()
        told[name] = held, numbers, make_card(root / name, save=False).text
    loaded = run_script("stock_load.py", root)[str(root)]
    return {name: (*told[name], loaded[name]) for name in TIES}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIES)
def test_what_a_card_says_of_plain_transformers_is_what_it_does(name, told_and_loaded):
    held, numbers, text, stock = told_and_loaded[name]
    says = re.search(r"What you get without `hf_tying`: (.*)", text)[1]
    right = max((abs(a - b) for a, b in zip(numbers, stock["logits"], strict=True)), default=0) < 1e-6
    assert right == ("wrong values" not in says) == ("run: plain" in text), says
    assert bool(stock["missing"]) == ("random" in says), says
    if right:
        more = {word: int(n.replace(",", "")) for n, word in re.findall(r"([\d,]+) parameters (more|fewer)", says)}
        assert stock["parameters"] - held == more.get("more", 0) - more.get("fewer", 0), says
    assert ("tied by the class itself" in says) <= (stock["parameters"] == held)


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_the_model(name, folders):
    model = MODELS[name]()
    held = sum(parameter.numel() for parameter in model.parameters())
    card = card_of(folders, name)
    row = re.search(r"\| parameters \| ([\d,]+) \| ([\d,]+) \|", card.text)
    assert int(row[1].replace(",", "")) == held
    bytes_in_file = (folders / name / "model.safetensors").stat().st_size
    assert f"| file | {bytes_in_file / 1000:,.2f} kB |" in card.text
    assert metadata_problems(card.data) == []
    assert not re.search(r"more information needed|None|\{\{|\{%", card.text, re.IGNORECASE)


def test_what_a_loader_without_this_package_gets_is_said(folders):
    says = {
        "two_way": ("transformers", "tied by the class itself", 2),
        "three_way": ("transformers", "tied by the class itself", 2),
        "layers": ("transformers", "512 parameters more, which are copies", 2),
        "projection": ("hf_tying", "**another function**", 1),
        "lstm": ("hf_tying", "transformers does not know this class", 1),
        "classifier": ("hf_tying", "transformers does not know this class", 1),
        "stock": ("transformers", "tied by the class itself", 2),
    }
    for name, (library, words, blocks) in says.items():
        card = card_of(folders, name)
        assert card.data.library_name == library and words in card.text, name
        found = blocks_of(card.text)
        assert len(found) == blocks and any(block.plain for block in found) == (library == "transformers"), name


def test_the_roles_of_a_group_are_named(folders):
    for name in ("two_way", "stock", "lstm"):
        assert "`lm_head.weight` | target <br> output | 64 x 16" in card_of(folders, name).text


def test_exactly_the_papers_behind_the_model_are_cited(folders):
    cited = {name: set(re.findall(r"arXiv:(\d+\.\d+)", card_of(folders, name).text)) for name in MODELS}
    assert cited["two_way"] == cited["projection"] == cited["lstm"] == cited["stock"] == {"1608.05859"}
    assert cited["three_way"] == {"1608.05859", "1706.03762"}
    assert cited["layers"] == cited["untied"] == cited["classifier"] == set()
    assert "arXiv:1611.01462" in card_of(folders, "lstm", features=["augmented"]).text


def test_tags_say_what_is_tied(folders):
    assert set(card_of(folders, "three_way").data.tags) == {"weight-tying", "tying:three_way"}
    assert set(card_of(folders, "layers").data.tags) == {"weight-tying", "tying:groups"}
    assert {"tying:two_way", "tying:projection"} <= set(card_of(folders, "projection").data.tags)
    assert card_of(folders, "untied").data.tags is None
    assert set(card_of(folders, "lstm").data.tags) == {"weight-tying", "tying:two_way"}
    assert card_of(folders, "classifier").data.pipeline_tag == "text-classification"


def test_results_are_a_table_and_a_model_index_with_the_untied_twin_beside(folders):
    card = card_of(
        folders, "three_way", results={"bleu": 98.28}, dataset="CLDR phrases", dataset_id="me/cldr",
        others={"untied": {"bleu": 98.44}},
    )  # fmt: skip
    assert "| bleu | 98.28 | 98.44 | CLDR phrases |" in card.text
    assert "| bleu | 98.28 | 98.44 | the untied twin |" in card.text
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("bleu", 98.28, "me/cldr")
    assert "model-index" not in ModelCard(card_of(folders, "two_way").content).data.to_dict()
    assert "model_name" not in card_of(folders, "two_way").content


def test_what_trainer_has_left_in_the_folder_is_in_the_card(folders, tmp_path):
    MODELS["two_way"]().save_pretrained(tmp_path)
    history = [{"step": i, "loss": 5 - i / 100, "grad_share/embeddings/output": i / 100} for i in range(1, 61)]
    state = {"global_step": 60, "log_history": [*history, {"step": 60, "eval_loss": 4.25, "eval_runtime": 1.5}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "all_results.json").write_text(json.dumps({"perplexity": 70.1, "train_loss": 4.5, "eval_loss": 4.25}))
    text = make_card(tmp_path, save=False).text
    assert "| perplexity | 70.1 |" in text and "| loss | 4.25 |" in text and "runtime" not in text
    assert "| embeddings/output | 1 % | 60 % |" in text
    assert "| 1 | 4.99 |  |" in text and "| 60 | 4.4 | 4.25 |" in text
    assert text.count("\n| ", text.index("## Training log")) <= 22 and "60 steps in all" in text


def test_facts_are_kept_so_that_the_card_can_be_made_again_from_files(tmp_path):
    MODELS["two_way"]().save_pretrained(tmp_path)
    told = {"license": "mit", "language": "en", "command": "python train.py", "description": "Of a test."}
    first = make_card(tmp_path, repo_id="me/x", **told)
    assert first.data.license == "mit" and "python train.py" in first.text and "Of a test." in first.text
    text = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").unlink()
    make_card(tmp_path, repo_id="me/x")
    assert (tmp_path / "README.md").read_text() == text
    make_card(tmp_path, repo_id="me/x")
    assert (tmp_path / "README.md").read_text() == text


def test_what_is_written_by_hand_survives_and_what_is_ours_is_renewed(tmp_path):
    MODELS["two_way"]().save_pretrained(tmp_path)
    make_card(tmp_path, repo_id="me/x", command="old")
    path = tmp_path / "README.md"
    text = (
        path.read_text()
        .replace("# x\n", "# x\n\nIntroduced by hand. <!-- a comment -->\n")
        .replace("1 of 2", "9 of 9")
    )
    path.write_text(text.replace("library_name:", "widget:\n- text: Hello\nlibrary_name:") + "\n## Mine\n\nBy hand.\n")
    MODELS["two_way"]().save_pretrained(tmp_path)
    make_card(tmp_path, repo_id="me/x", command="new")
    text = path.read_text()
    assert "Introduced by hand. <!-- a comment -->" in text and text.endswith("## Mine\n\nBy hand.\n")
    assert "9 of 9" not in text and "1 of 2" in text and "\nnew\n" in text and "\nold\n" not in text
    assert "widget" in text


def test_a_section_that_has_nothing_to_say_any_more_goes():
    made = SECTION.format("x")
    before = f"# t\n\n{made}\n\n<!-- hf_tying:results -->\nold\n<!-- /hf_tying:results -->\n\nBy hand.\n"
    assert merge_sections(before, SECTION.format("y"), "t") == f"# t\n\n{SECTION.format('y')}\n\nBy hand.\n"


def test_a_new_section_comes_after_the_one_before_it():
    made = f"{SECTION.format('x')}\n\n<!-- hf_tying:load -->\nnew\n<!-- /hf_tying:load -->"
    text = merge_sections(f"# t\n\n{SECTION.format('x')}\n\nBy hand.\n", made, "t")
    assert text == f"# t\n\n{made}\n\nBy hand.\n"


def test_templates_lose_their_placeholders_and_keep_what_was_filled_in():
    template = ModelCard.from_template(ModelCardData()).text
    filled = template.replace("## Uses", "## Uses\n\nFor fun.").replace(
        "- **Model type:** [More Information Needed]", "- **Model type:** small"
    )
    text = without_placeholders(filled, "x")
    assert text.startswith("# x\n") and "More Information" not in text and "<!--" not in text
    assert "## Uses\n\nFor fun." in text and "- **Model type:** small" in text and "## Citation" not in text
    own = "# t\n\n## To do\n\n<!-- mine -->\n\n[link]()\n"
    assert without_placeholders(own, "x") == own


@pytest.mark.parametrize(
    "facts, says",
    [
        ({"license": "my own licence"}, "license is 'my own licence': expected one word"),
        ({"base_model": "/home/me/base"}, "base_model is '/home/me/base': expected the id of a repository"),
        ({"language": "English"}, "language is 'English'"),
        ({"datasets": ["a b"]}, "datasets has 'a b'"),
        ({"licence": "mit"}, "make_card has 'licence': expected some of"),
    ],
)
def test_facts_that_the_hub_would_refuse_are_refused_and_nothing_is_written(facts, says, folders):
    with pytest.raises(TyingError, match=re.escape(says)):
        make_card(folders / "two_way", **facts)
    assert not (folders / "two_way" / "README.md").exists()
    assert not (folders / "two_way" / "tying_card.json").exists()


def test_names_from_a_file_are_no_markup(tmp_path):
    model = tiny_model("qwen3")
    hostile = "x|y`<!-- /hf_tying:ties --><script>\x1b[2J"
    tie(model, TyingConfig(groups={hostile: layer_pair(model)}), init_from="mean").save_pretrained(tmp_path)
    text = make_card(tmp_path, save=False).text
    assert "<script>" not in text and "\x1b" not in text and text.count("<!-- /hf_tying:ties -->") == 1
    row = next(line for line in text.splitlines() if "down\\_proj" in line or "down_proj" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 6


def test_a_broken_tie_is_in_the_card(tmp_path):
    import torch

    MODELS["stock"]().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(64, 16)}, file, {"format": "pt"})
    text = make_card(tmp_path, save=False).text
    assert "**T001**" in text and "config and file agree" not in text


def test_a_base_model_in_a_folder_is_in_no_card(tmp_path):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    for also_lora in (True, False):
        model = tiny_model("llama")
        model.config._name_or_path = model.name_or_path = str(base)
        tied_lora(model, task_type="CAUSAL_LM").save_pretrained(tmp_path / str(also_lora), also_lora=also_lora)
        text = (tmp_path / str(also_lora) / "README.md").read_text()
        assert str(tmp_path) not in text and "base_model:" not in text
        assert "## What is shared" in text and "More Information" not in text


def test_a_trainer_of_an_ordinary_adapter_over_a_tied_model_writes_its_own_card(tmp_path, told):
    from types import SimpleNamespace

    from peft import LoraConfig, get_peft_model

    from hf_tying.hub.folders import finish_folder
    from hf_tying.hub.uploads import renew_trainers_card

    model = get_peft_model(MODELS["two_way"](), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    told.clear()
    renew_trainers_card(SimpleNamespace(model=model, args=SimpleNamespace(output_dir=tmp_path), hub_model_id=None))
    finish_folder(tmp_path, "me/x")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and not told


def test_a_card_that_cannot_be_made_loses_no_save(tmp_path, told, monkeypatch):
    from hf_tying.hub import renewing

    def fails(*args, **kwargs):
        raise RuntimeError("no card today")

    monkeypatch.setattr(renewing, "make_card", fails)
    tied_lora(tiny_model("llama"), task_type="CAUSAL_LM").save_pretrained(tmp_path / "out", also_lora=True)
    assert (tmp_path / "out" / "tied_lora" / "adapter_model.safetensors").is_file()
    assert any("no card today" in message and "make_card(folder)" in message for message in told)


def test_a_block_that_does_not_run_is_named():
    good = "<!-- run -->\n```python\nassert 'me/x' != '/f' and \"/f\"\n```\n"
    assert run_blocks(good, "me/x", "/f") == 1
    bad = "<!-- run: plain -->\n```python\nimport hf_tying\n```\n"
    with pytest.raises(TyingError, match="without hf_tying of the card does not run .*No module named 'hf_tying'"):
        run_blocks(bad, "me/x", "/f")
    assert blocks_of("```python\nnot ours\n```") == []
