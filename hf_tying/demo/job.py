"""The demo with a language model, from the text to the checks, in order."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.markup import escape
from transformers import set_seed
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from .._extras import require
from ..data import (
    Corpus,
    blocks_for_language_modeling,
    corpus_from_files,
    standard_library_corpus,
    train_byte_level_bpe,
)
from ..training.callbacks import TyingCallback
from .fresh_process import score
from .measuring import one_thread
from .models import build_pair, differing_at_the_start, small_config
from .proof import MOST_PERPLEXITY_RATIO, Check, reload_checks, still_tied
from .report import (
    check_lines,
    comparison_table,
    measurements,
    plot_curves,
    report,
    save_models,
    write_report,
)
from .settings import REPORT, DemoSettings
from .training import Run, train

if TYPE_CHECKING:
    import datasets


@one_thread()
def run_demo(settings: DemoSettings, console: Console | None = None) -> bool:
    """Train an untied and a tied model, compare and save them, load them again, and check the claims.

    `settings.output_dir` gets `untied/`, `tied/`, `report.json` and `curves.png`, also if a claim does not hold.

    Args:
        settings (`DemoSettings`): settings of the demo.
        console (`rich.console.Console`, *optional*): console for the table and the claims. Default: standard output.

    Returns:
        `bool`: whether all claims hold.

    Raises:
        TyingError: the text, the model or the scheme cannot be used. Nothing is written then.
    """
    require("matplotlib.figure", "The picture of the demo", "demo")
    console = console or Console()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # for loading and saving; the trainer's bar stays

    small_config(settings.model_type, settings.vocab_size, settings.block_size)  # refused before any text is read
    corpus = corpus_from_files(settings.train_file) if settings.train_file else standard_library_corpus()
    tokenizer = train_byte_level_bpe(corpus.train, settings.vocab_size)
    training_blocks = blocks_for_language_modeling(corpus.train, tokenizer, settings.block_size)
    validation_blocks = blocks_for_language_modeling(corpus.validation, tokenizer, settings.block_size)
    config = small_config(settings.model_type, len(tokenizer), settings.block_size)
    models = build_pair(config, settings.scheme, settings.seed)
    differing = differing_at_the_start(*models)
    described = _describe(corpus, tokenizer, training_blocks, validation_blocks)
    _announce(console, settings, described)

    untied = train(models[0], "untied", settings, training_blocks, validation_blocks)
    tied = train(
        models[1], settings.scheme, settings, training_blocks, validation_blocks, [TyingCallback(log_roles=True)]
    )

    runs = {"untied": untied, "tied": tied}
    folders = save_models(settings, tokenizer, {name: run.model for name, run in runs.items()})
    blocks = torch.tensor(validation_blocks["input_ids"][:])
    results = {name: measurements(run, folders[name]) | {"perplexity": run.perplexity} for name, run in runs.items()}
    checks = [
        *_fairness(untied, tied, differing),
        *_outcome(results),
        still_tied("it is tied after training (assert_tied)", tied.model),
        *reload_checks(folders["tied"], score(tied.model, blocks), blocks),
    ]
    sample = _sample(tied, tokenizer, _prompt(corpus), settings.seed)

    plot_curves(
        {"untied": untied, settings.scheme: tied},
        lambda run: f"perplexity {run.perplexity:.1f}",
        settings.output_dir / "curves.png",
    )
    results |= {"checks": [asdict(check) for check in checks], "sample": sample}
    write_report(report(settings, described, runs, results), settings.output_dir)
    _conclude(console, settings, results, checks)
    return all(check.holds for check in checks)


def _describe(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    training_blocks: "datasets.Dataset",
    validation_blocks: "datasets.Dataset",
) -> dict:
    block_size = len(training_blocks[0]["input_ids"])
    return {
        "name": corpus.name,
        "fingerprint": corpus.fingerprint,
        "characters": sum(map(len, corpus.train)),
        "vocabulary": len(tokenizer),
        "training_tokens": len(training_blocks) * block_size,
        "validation_tokens": len(validation_blocks) * block_size,
    }


def _announce(console: Console, settings: DemoSettings, corpus: dict) -> None:
    tokens = settings.steps * settings.batch_size * settings.block_size
    console.print(
        f"[bold]Text[/]   {escape(corpus['name'])}: {corpus['characters']:,} characters, "
        f"{corpus['training_tokens']:,} tokens to train on, {corpus['validation_tokens']:,} held out\n"
        f"[bold]Models[/] two of type {settings.model_type}, untied and {settings.scheme}, {tokens:,} tokens each, "
        f"seed {settings.seed}, vocabulary {corpus['vocabulary']:,} (byte-level BPE)",
        highlight=False,
        soft_wrap=True,
    )


def _fairness(untied: Run, tied: Run, differing: list[str]) -> list[Check]:
    return [
        Check(
            "both start from the same weights, the untied output matrix apart",
            not differing,
            f"different: {', '.join(differing)}" if differing else "every parameter of the tied model compared",
        ),
        Check(
            "both see the same tokens in the same order",
            untied.data == tied.data and untied.tokens == tied.tokens,
            f"{untied.tokens:,} and {tied.tokens:,} tokens, digests {untied.data} and {tied.data}",
        ),
    ]


def _outcome(results: dict[str, dict]) -> list[Check]:
    untied, tied = results["untied"], results["tied"]
    ratio = tied["perplexity"] / untied["perplexity"]
    return [
        Check(
            "the tied model has fewer parameters",
            tied["parameters"] < untied["parameters"],
            f"{tied['parameters']:,} and {untied['parameters']:,}",
        ),
        Check(
            "the tied model's file is smaller",
            tied["checkpoint_bytes"] < untied["checkpoint_bytes"],
            f"{tied['checkpoint_bytes']:,} and {untied['checkpoint_bytes']:,} bytes",
        ),
        Check(
            f"its perplexity is at most {MOST_PERPLEXITY_RATIO} of the untied model's",
            ratio <= MOST_PERPLEXITY_RATIO,
            f"ratio {ratio:.3f}",
        ),
    ]


def _prompt(corpus: Corpus) -> str:
    """The beginning of the first validation line that looks like a sentence."""
    lines = [line.split() for text in corpus.validation for line in text.splitlines()]
    words = next((words for words in lines if len(words) > 8 and words[0].istitle()), corpus.validation[0].split())
    return " ".join(words[:6])


def _sample(tied: Run, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int) -> dict[str, str]:
    """The continuation of `prompt` by the tied model, 64 tokens."""
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(tied.model.device)
    set_seed(seed)
    output = tied.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=64,
        do_sample=True,
        top_p=0.9,
        temperature=0.8,
        pad_token_id=tokenizer.eos_token_id,
    )
    return {"prompt": prompt, "continuation": tokenizer.decode(output[0, tokens.shape[1] :])}


def _conclude(console: Console, settings: DemoSettings, results: dict, checks: list[Check]) -> None:
    console.print(comparison_table(results["untied"], results["tied"], settings.scheme))
    sample = results["sample"]
    text = f"[italic]{escape(sample['prompt'])}[/]{escape(sample['continuation'])}"
    console.print(f"[bold]Sample[/] {text}", highlight=False, soft_wrap=True)
    for line in check_lines(checks):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"[bold]Written[/] {escape(str(settings.output_dir))}: untied, tied, curves.png, {REPORT}\n"
        "[bold]On your own text[/] hf-tying demo --train_file FILE --model_type gpt2 --scheme two_way "
        "--output_dir runs/mine",
        highlight=False,
        soft_wrap=True,
    )
