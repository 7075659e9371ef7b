"""The settings of the demos. Mistakes of a user are refused here or while reading, before anything is written."""

from dataclasses import dataclass
from pathlib import Path

from ..config import TyingConfig, TyingError

#: The file that marks an output folder of the demo. It is written first and completed last.
REPORT = "report.json"


@dataclass(frozen=True)
class _Settings:
    """The settings that both demos have."""

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
        """Refuse a folder with other files, because the demo replaces folders with names such as `untied`."""
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
        train_file (`tuple[Path, ...]`): UTF-8 text files. Default: none, which means Python's language reference and
            the docstrings of its standard library.
        model_type (`str`): type of a causal language model of transformers. Default `"llama"`.
        output_dir (`Path`): folder for models, report and picture. It is made if it does not exist.
        seed (`int`): seed of the weights, the order of the data and the sample. Default 0.
        steps (`int`): number of optimizer steps of each model. The default, 1,000 steps of 512 tokens, takes little
            more than a minute on one core, and is nearly one pass over the default corpus.
        vocab_size (`int`): largest number of entries of the byte-level BPE. Default 4096.
        batch_size (`int`): number of sequences in a step. Default 4, because with so few tokens many small steps are
            better.
        learning_rate (`float`): peak of the cosine schedule, after a warm-up of a tenth of the steps. The default,
            0.003, is between the best value of the untied model (0.002) and that of the tied model (0.0045), each
            measured in 600 steps. The tied model at 0.003 is also better than the untied model at its best value.
        scheme (`str`): scheme of the second model. Default `"two_way"`.
        block_size (`int`): number of tokens in a training sequence. Default 128.
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
        train_file (`tuple[Path, ...]`): files of JSON lines such as `{"translation": {"en": "...", "de": "..."}}`.
            Default: none, which means pairs that Babel generates from CLDR.
        model_type (`str`): type of an encoder-decoder of transformers. Default `"marian"`.
        output_dir (`Path`): folder for models, report and picture. It is made if it does not exist.
        seed (`int`): seed of the pairs, the weights and the order of the data. Default 0.
        steps (`int`): number of optimizer steps of each model. The default, 2,000 steps of 32 pairs, takes a minute
            and a half on one core, and is nearly four passes over the default pairs.
        vocab_size (`int`): largest number of entries of the joint byte-level BPE. Default 2000.
        batch_size (`int`): number of pairs in a step. Default 32, because with so few pairs many small steps are
            better.
        learning_rate (`float`): peak of the cosine schedule, after a warm-up of a tenth of the steps. Default 0.0015.
        source_language (`str`): language to translate from, a locale of CLDR or a key of the JSON lines. Default
            `"en"`.
        target_language (`str`): language to translate to. Default `"de"`.
        max_length (`int`): largest number of tokens in a sentence; longer ones are cut. Default 64.
        num_beams (`int`): number of beams of the translations that new processes repeat. Default 4. The scores are
            those of greedy translations.
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
        """Whether the text is the one that the defaults were chosen for."""
        languages = (TranslationSettings.source_language, TranslationSettings.target_language)
        return not self.train_file and (self.source_language, self.target_language) == languages
