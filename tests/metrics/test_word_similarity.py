"""Word similarity against its plain definition, the files it reads, and the script that makes the paper's tables."""

import json
import math
import sys
from pathlib import Path

import evaluate
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_tying import tie
from hf_tying.metrics import WordSimilarity, read_word_pairs, spearman, word_id, word_similarities

from ..tiny import tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "papers"))
import embedding_similarity  # noqa: E402

NAN = math.nan


def plain_spearman(first, second) -> float:
    """Pearson's correlation of ranks; a value's rank is the mean place of its equals in the sorted list."""
    ranks = []
    for values in (first, second):
        order = sorted(values)
        ranks.append([sum(i for i, v in enumerate(order) if v == value) / order.count(value) for value in values])
    return torch.corrcoef(torch.tensor(ranks, dtype=torch.float64))[0, 1].item()


class TestSpearman:
    def test_it_is_the_plain_definition_with_ties(self):
        torch.manual_seed(0)
        first = torch.randint(6, (40,)).tolist()
        second = [value + noise for value, noise in zip(first, torch.randint(4, (40,)).tolist(), strict=True)]
        assert spearman(first, second) == pytest.approx(plain_spearman(first, second), abs=1e-12)
        assert 0.5 < spearman(first, second) < 0.99

    def test_by_hand_with_a_tie(self):
        # Ranks less their means: -1.5, 0, 0, 1.5 and -0.5, -1.5, 0.5, 1.5.
        assert spearman([10, 20, 20, 30], [2, 1, 3, 4]) == pytest.approx(3 / math.sqrt(4.5 * 5))

    def test_with_scipys_own_where_it_is_installed(self):
        stats = pytest.importorskip("scipy.stats")
        torch.manual_seed(1)
        first, second = torch.randint(9, (2, 50)).tolist()
        assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)

    def test_only_the_order_counts(self):
        assert spearman([1, 2, 3, 4], [math.exp(x) for x in (1, 2, 3, 4)]) == pytest.approx(1.0)
        assert spearman([1, 2, 3, 4], [-(x**3) for x in (1, 2, 3, 4)]) == pytest.approx(-1.0)

    def test_too_little_to_rank_is_nan(self):
        assert math.isnan(spearman([], [])) and math.isnan(spearman([1], [1])) and math.isnan(spearman([1, 2], [3, 3]))
        with pytest.raises(ValueError, match="of one length"):
            spearman([1, 2], [1, 2, 3])


class TestMetric:
    def test_unknown_pairs_are_left_out_and_counted(self):
        scores = WordSimilarity(keep_in_memory=True).compute(
            predictions=[0.3, NAN, 0.1, 0.2, NAN], references=[5.0, 1.0, 2.0, 4.0, 9.0]
        )
        assert scores == {"spearman": pytest.approx(1.0), "pairs": 3, "unknown": 2}

    def test_it_is_a_metric_of_evaluate_that_takes_batches(self):
        metric = WordSimilarity(keep_in_memory=True)
        assert isinstance(metric, evaluate.Metric)
        metric.add(prediction=0.3, reference=1.0)
        metric.add_batch(predictions=[0.1, 0.2], references=[2.0, 3.0])
        assert metric.compute()["spearman"] == pytest.approx(-0.5)


class TestSimilarities:
    def test_they_are_cosines_of_rows_and_nan_for_what_is_unknown(self):
        torch.manual_seed(0)
        matrix = torch.nn.Parameter(torch.randn(5, 7))
        with torch.no_grad():
            matrix[3] = 0
        vocabulary = {"cat": 0, "dog": 1, "sun": 2, "<pad>": 3}
        pairs = [("cat", "dog", 1.0), ("Cat", "sun", 2.0), ("cat", "zebra", 3.0), ("cat", "<pad>", 4.0)]
        found = word_similarities(matrix, vocabulary, pairs)
        assert found[0] == pytest.approx(F.cosine_similarity(matrix[0], matrix[1], dim=0).item(), abs=1e-6)
        assert found[1] == pytest.approx(F.cosine_similarity(matrix[0], matrix[2], dim=0).item(), abs=1e-6)
        assert math.isnan(found[2]) and math.isnan(found[3])
        assert word_similarities(matrix, vocabulary, []) == []

    def test_a_word_is_looked_up_as_written_then_in_lower_case_and_at_the_start_of_a_word(self):
        assert word_id("Paris", {"paris": 1, "Paris": 2}) == 2
        assert word_id("Paris", {"paris": 1}) == 1
        assert word_id("sun", {"sun": 1, "Ġsun": 2}) == 2 and word_id("sun", {"sun": 1, "▁sun": 3}) == 3
        assert word_id("PARIS", {"Paris": 1}) is None

    def test_the_tokenizer_of_another_model_is_told(self):
        with pytest.raises(ValueError, match="id 9, but the matrix 5 rows"):
            word_similarities(torch.ones(5, 2), {"a": 9, "b": 1}, [("a", "b", 1.0)])


class TestFiles:
    def test_tabs_and_spaces_and_empty_lines(self, tmp_path):
        file = tmp_path / "pairs.txt"
        file.write_text("sun\tsunlight\t50.0\n\ncold   hot 1\nnaïve\tsimple\t.25\n", encoding="utf-8")
        expected = [("sun", "sunlight", 50.0), ("cold", "hot", 1.0), ("naïve", "simple", 0.25)]
        assert read_word_pairs(file) == expected

    @pytest.mark.parametrize("text, message", [
        ("a b 1\nword1 word2 score\n", "line 2: expected two words and a number"), ("a b\n", "line 1"),
        ("a b c 1\n", "line 1"), ("a b nan\n", "line 1"), ("", "no word pairs"), ("\n \n", "no word pairs"),
    ])  # fmt: skip
    def test_another_form_is_told_with_its_line(self, tmp_path, text, message):
        (tmp_path / "pairs.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_word_pairs(tmp_path / "pairs.txt")


def word_level(words: dict[str, int]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture
def models_and_sets(tmp_path):
    """Folders of an untied model, of its tied twin and of two sets; words `w0` to `w59`."""
    words = {f"w{i}": i for i in range(60)} | {"<unk>": 60}
    untied = tiny_model("gpt2", tie_word_embeddings=False)
    tied = tie(tiny_model("gpt2", tie_word_embeddings=False), "two_way", init_from="output")
    for name, model in (("untied", untied), ("tied", tied)):
        model.save_pretrained(tmp_path / name)
        word_level(words).save_pretrained(tmp_path / name)
    sets = tmp_path / "sets"
    sets.mkdir()
    torch.manual_seed(2)
    pairs = {name: [(f"w{a}", f"W{b}") for a, b in torch.randint(60, (n, 2)).tolist()] for name, n in
             {"one": 30, "two": 20}.items()}  # fmt: skip
    written = {}
    for name, held in pairs.items():
        # People's scores follow the output embedding.
        scores = word_similarities(untied.lm_head.weight, words, [(a, b, 0.0) for a, b in held])
        written[name] = [(a, b, score) for (a, b), score in zip(held, scores, strict=True)]
        lines = [f"{a}\t{b}\t{score!r}" for a, b, score in written[name]] + ["w1\tunheard\t3.0"]
        (sets / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path, untied, words, written


def run(monkeypatch, folder, **flags):
    flags = {"similarity_dir": folder / "sets", "output_dir": folder / "out", **flags}
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["embedding_similarity.py", *argv])
    embedding_similarity.main()
    return json.loads((folder / "out" / "results.json").read_text())


class TestScript:
    def test_it_makes_both_tables(self, models_and_sets, monkeypatch, capsys):
        folder, untied, words, written = models_and_sets
        results = run(monkeypatch, folder, model=folder / "untied", tied_model=folder / "tied")
        for name, pairs in written.items():
            row, scores = results["sets"][name], [score for *_, score in pairs]
            assert (row["pairs"], row["unknown"]) == (len(pairs), 1)
            assert row["output"] == row["tied"] == 1.0  # the scores are its own, and the tied twin has its matrix
            cosines = word_similarities(untied.transformer.wte.weight, words, pairs)
            assert row["input"] == pytest.approx(plain_spearman(cosines, scores), abs=1e-4)
            between = results["between"][name]
            assert between["output, tied"] == 1.0 and between["input, tied"] == between["input, output"] < 1
            assert between["input, output"] == row["input"]
        assert results["between"]["all"]["pairs"] == len({pair[:2] for pairs in written.values() for pair in pairs})
        printed = capsys.readouterr().out
        assert "people's scores" in printed and "between embeddings" in printed and "output, tied" in printed

    def test_a_word_that_one_model_lacks_is_left_out_for_all(self, models_and_sets, monkeypatch):
        folder, untied, words, written = models_and_sets
        lacking = written["one"][0][0]
        word_level({word: i for word, i in words.items() if word != lacking}).save_pretrained(folder / "tied")
        row = run(monkeypatch, folder, model=folder / "untied", tied_model=folder / "tied")["sets"]["one"]
        kept = [pair for pair in written["one"] if lacking not in (pair[0], pair[1].lower())]
        assert (row["pairs"], row["unknown"]) == (len(kept), 31 - len(kept)) and len(kept) < 30
        cosines = word_similarities(untied.transformer.wte.weight, words, kept)
        assert row["input"] == pytest.approx(plain_spearman(cosines, [score for *_, score in kept]), abs=1e-4)

    def test_a_tied_model_alone_has_its_one_embedding(self, models_and_sets, monkeypatch):
        folder, *_ = models_and_sets
        results = run(monkeypatch, folder, model=folder / "tied")
        assert results["sets"]["one"].keys() == {"pairs", "unknown", "tied"}

    @pytest.mark.parametrize("flags, message", [
        (dict(model="tied", tied_model="tied"), "is tied itself"),
        (dict(model="untied", tied_model="untied"), "is not tied"),
        (dict(model="untied", similarity_dir="untied"), "has no .txt file"),
        (dict(model="sets"), "not the folder of a causal language model"),
    ])  # fmt: skip
    def test_what_does_not_fit_is_told(self, models_and_sets, monkeypatch, flags, message):
        folder, *_ = models_and_sets
        with pytest.raises(ValueError, match=message):
            run(monkeypatch, folder, **{name: folder / value for name, value in flags.items()})

    def test_a_set_of_unknown_words_alone_has_no_number(self, models_and_sets, monkeypatch):
        folder, *_ = models_and_sets
        (folder / "sets" / "three.txt").write_text("unheard w1 2.0\n")
        row = run(monkeypatch, folder, model=folder / "untied")["sets"]["three"]
        assert row == {"pairs": 0, "unknown": 1, "input": None, "output": None}
