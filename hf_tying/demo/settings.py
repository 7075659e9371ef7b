"""What the demos run with. What a user can get wrong is refused here or while reading, before anything is written."""

from dataclasses import dataclass
from pathlib import Path

from ..config import TyingConfig, TyingError

#: The demo's own mark in its output folder, written first and completed last.
REPORT = "report.json"


@dataclass(frozen=True)
class _Settings:
    """What both demos are asked."""

    train_file: tuple[Path, ...] = ()
    model_type: str = ""
    output_dir: Path = Path("runs")
    seed: int = 0
    steps: int = 1000
    vocab_size: int = 4096
    batch_size: int = 4
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise TyingError(f"{name} is {getattr(self, name)}: expected at least 1.")
        self._check_output_dir()

    def _check_output_dir(self) -> None:
        """Refuse to write among files that are not the demo's: it replaces folders called `untied` and the like."""
        for folder in (self.output_dir, *self.output_dir.parents):
            if folder.exists() and not folder.is_dir():
                raise TyingError(
                    f"The output folder {str(self.output_dir)!r} cannot be made: {str(folder)!r} is a file."
                )
        if self.output_dir.exists() and any(self.output_dir.iterdir()) and not (self.output_dir / REPORT).exists():
            raise TyingError(
                f"The output folder {str(self.output_dir)!r} holds files that no demo wrote (it has no {REPORT}). "
                "Give an empty or a new folder with --output_dir."
            )


@dataclass(frozen=True)
class DemoSettings(_Settings):
    """Arguments of `run_demo`.

    Args:
        train_file (`tuple[Path, ...]`): UTF-8 text files; none means the text that CPython carries.
        model_type (`str`): a causal language model of transformers.
        output_dir (`Path`): where models, report and picture go; made if absent.
        seed (`int`): of the weights, the order of the data and the sample.
        steps (`int`): optimizer steps of each model. 1,000 steps of 512 tokens take little more than a minute on one
            core, and are nearly one pass over the default corpus.
        vocab_size (`int`): entries of the byte-level BPE, at most.
        batch_size (`int`): sequences in a step. Small: so few tokens are better spent on many steps.
        learning_rate (`float`): peak of the cosine schedule, after a warm-up of a tenth of the steps. Between what is
            best for the untied model (0.002) and for the tied one (0.0045), each measured in 600 steps; the tied model
            at 0.003 is also better than the untied one at its best.
        scheme (`str`): what to tie in the second model.
        block_size (`int`): tokens in a training sequence.
    """

    model_type: str = "llama"
    output_dir: Path = Path("runs/demo")
    scheme: str = "two_way"
    block_size: int = 128

    def __post_init__(self) -> None:
        if TyingConfig(scheme=self.scheme).scheme == "none":
            raise TyingError("Scheme 'none' ties nothing, so there is nothing to compare: expected two_way.")
        super().__post_init__()


@dataclass(frozen=True)
class TranslationSettings(_Settings):
    """Arguments of `run_translation_demo`.

    Args:
        train_file (`tuple[Path, ...]`): files of JSON lines such as `{"translation": {"en": "...", "de": "..."}}`;
            none means the pairs that Babel makes from CLDR.
        model_type (`str`): an encoder-decoder of transformers.
        output_dir (`Path`): where models, report and picture go; made if absent.
        seed (`int`): of the pairs, the weights and the order of the data.
        steps (`int`): optimizer steps of each model. 2,000 steps of 32 pairs take a minute and a half on one core,
            and are nearly four passes over the default pairs.
        vocab_size (`int`): entries of the joint byte-level BPE, at most.
        batch_size (`int`): pairs in a step. Small: so few pairs are better spent on many steps.
        learning_rate (`float`): peak of the cosine schedule, after a warm-up of a tenth of the steps.
        source_language (`str`): what to translate from: a locale of CLDR, or a key of the JSON lines.
        target_language (`str`): what to translate to.
        max_length (`int`): tokens in a sentence at most; longer ones are cut.
        num_beams (`int`): beams of the translations that fresh processes repeat; scores are of greedy ones.
    """

    model_type: str = "marian"
    output_dir: Path = Path("runs/translation")
    steps: int = 2000
    vocab_size: int = 2000
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    source_language: str = "en"
    target_language: str = "de"
    max_length: int = 64
    num_beams: int = 4

    @property
    def is_default_pair(self) -> bool:
        """Whether it is the text that the defaults were chosen for."""
        languages = (TranslationSettings.source_language, TranslationSettings.target_language)
        return not self.train_file and (self.source_language, self.target_language) == languages
