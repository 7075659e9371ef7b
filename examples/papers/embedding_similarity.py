r"""Press & Wolf 2016: which embedding is the better word vector, and which of the two does a tied one resemble?

    python examples/papers/embedding_similarity.py --model runs/small --tied_model runs/small+wt \
        --similarity_dir DIR --output_dir runs/similarity

`--model` is the folder of an untied causal language model with its tokenizer, `--tied_model` that of its tied twin (a
tied one may also stand alone, as `--model`). DIR has the sets of word pairs as .txt files, `word`, `word` and people's
score on each line: SimLex-999, Verb-143, MEN, RW (rare words) and MTurk-771 in the paper. A word counts where it is
one entry of the vocabulary, as it is written or in lower case, and a pair where that holds in each model.

Two tables, and `OUT/results.json`: Spearman's correlation of the cosine similarities with the scores, for the input,
output and tied embedding on each set; and between the similarities that two embeddings give. In the paper the output
embedding is the better one of an untied language model, and the tied one is much more like it than like the input
embedding (its tables are not repeated here).
"""

import math
import sys
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_tying import TyingError
from hf_tying.metrics import WordSimilarity, read_word_pairs, spearman, word_similarities
from hf_tying.ties.anatomy import roles
from hf_tying.ties.slots import find_parameter
from hf_tying.training.command_line import ScriptParser
from hf_tying.training.results_file import write_json


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder of an untied causal language model, and of its tokenizer."})
    similarity_dir: str = field(metadata={"help": "Folder with the sets of word pairs, *.txt."})
    output_dir: str = field(metadata={"help": "Where results.json is written."})
    tied_model: str | None = field(default=None, metadata={"help": "Folder of its tied twin."})


def read_embeddings(path: str) -> dict[str, tuple]:
    """`input` and `output` of an untied model, or `tied` of a tied one: the matrix and the vocabulary of each."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path)
        vocabulary = AutoTokenizer.from_pretrained(path).get_vocab()
    except TyingError:
        raise
    except (OSError, ValueError) as error:  # transformers raises either, by what is missing
        raise TyingError(
            f"{path!r} is not the folder of a causal language model with its tokenizer: {error}"
        ) from error
    matrices = [find_parameter(model, roles(model)[role].name) for role in ("target", "output")]
    if matrices[0] is matrices[1]:
        return {"tied": (matrices[0], vocabulary)}
    return {name: (matrix, vocabulary) for name, matrix in zip(("input", "output"), matrices, strict=True)}


def compare(embeddings: dict[str, tuple], sets: dict[str, list]) -> dict:
    """Both tables, as plain JSON values."""
    results = {"sets": {}, "between": {}}
    everything = list({pair[:2]: pair for pairs in sets.values() for pair in pairs}.values())
    for name, pairs in {**sets, "all": everything}.items():
        found = {key: word_similarities(*held, pairs) for key, held in embeddings.items()}
        # The same pairs for each embedding.
        known = [not any(math.isnan(value) for value in values) for values in zip(*found.values(), strict=True)]
        found = {
            key: [value if ok else math.nan for value, ok in zip(values, known, strict=True)]
            for key, values in found.items()
        }
        if name != "all":  # scores of different sets are not on one scale
            scores = [score for _, _, score in pairs]
            of = {
                key: WordSimilarity(keep_in_memory=True).compute(predictions=values, references=scores)
                for key, values in found.items()
            }
            counts = next(iter(of.values()))
            results["sets"][name] = {"pairs": counts["pairs"], "unknown": counts["unknown"]}
            results["sets"][name] |= {key: number(score["spearman"]) for key, score in of.items()}
        kept = {key: [value for value in values if not math.isnan(value)] for key, values in found.items()}
        results["between"][name] = {"pairs": sum(known)}
        results["between"][name] |= {f"{a}, {b}": number(spearman(kept[a], kept[b])) for a, b in combinations(kept, 2)}
    return results


def number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def table(title: str, rows: dict[str, dict]) -> Table:
    drawn = Table("set", title=title)
    for column in next(iter(rows.values())):
        drawn.add_column(column, justify="right")
    for name, row in rows.items():
        drawn.add_row(name, *("-" if value is None else str(value) for value in row.values()))
    return drawn


def main():
    (arguments,) = ScriptParser((Arguments,), description=__doc__).parse()
    files = sorted(Path(arguments.similarity_dir).glob("*.txt"))
    if not files:
        raise TyingError(f"{arguments.similarity_dir!r} has no .txt file: expected sets of word pairs.")
    sets = {file.stem: read_word_pairs(file) for file in files}
    embeddings = read_embeddings(arguments.model)
    if arguments.tied_model:
        if "tied" in embeddings:
            raise TyingError(
                f"--model {arguments.model!r} is tied itself: expected an untied one beside --tied_model."
            )
        tied = read_embeddings(arguments.tied_model)
        if "tied" not in tied:
            raise TyingError(f"--tied_model {arguments.tied_model!r} is not tied: expected a tied one.")
        embeddings |= tied
    results = {"model": arguments.model, "tied_model": arguments.tied_model, **compare(embeddings, sets)}
    output = Path(arguments.output_dir)
    write_json(results, output / "results.json")
    console = Console()
    console.print(table("Spearman's correlation with people's scores", results["sets"]))
    if len(embeddings) > 1:
        console.print(table("Spearman's correlation between embeddings", results["between"]))
    console.print(f"Written {output / 'results.json'}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except (TyingError, ValueError) as error:
        sys.exit(f"error: {error}")
