"""The pairs of the demo as text and as token ids: those that Babel generates from CLDR, or the user's own."""

from dataclasses import dataclass
from importlib.metadata import version

import datasets

from ...config import TyingError
from ...data.cldr import cldr_corpus
from ...data.parallel import ParallelCorpus, encode_parallel, read_translation_json
from ...data.split import Pair, split_pairs
from ...data.tokenizers import joint_tokenizer
from ..settings import TranslationSettings

_VALIDATION_FRACTION = 0.05
# More pairs would make the scores a little more precise, and the demo much longer.
_MOST_HELD_OUT = 1000


@dataclass(frozen=True)
class Corpora:
    """Training and validation pairs, and the joint vocabulary of the training pairs.

    Args:
        name (`str`): name of the text in reports.
        train (`ParallelCorpus`): training pairs.
        validation (`ParallelCorpus`): validation pairs, without a line of the training pairs in either language.
        tokenizer (`PreTrainedTokenizerFast`): tokenizer of both languages.
        train_ids (`datasets.Dataset`): training pairs as `input_ids`, `attention_mask` and `labels`.
        validation_ids (`datasets.Dataset`): validation pairs in the same form.
    """

    name: str
    train: ParallelCorpus
    validation: ParallelCorpus
    tokenizer: object
    train_ids: datasets.Dataset
    validation_ids: datasets.Dataset

    def describe(self) -> dict:
        """Return the description of the text for the report."""
        return {
            "name": self.name,
            "source_language": self.train.source_language,
            "target_language": self.train.target_language,
            "fingerprint": self.train.fingerprint + self.validation.fingerprint,
            "training_pairs": len(self.train),
            "validation_pairs": len(self.validation),
            "vocabulary": len(self.tokenizer),
        }


def prepared_corpora(settings: TranslationSettings) -> Corpora:
    """Generate or read the pairs, split them, train the vocabulary, and encode them.

    Args:
        settings: settings of the demo.

    Raises:
        TyingError: the languages or files cannot be used, there are too few pairs, or the vocabulary is too small.
    """
    languages = (settings.source_language, settings.target_language)
    if settings.train_file:
        name = ", ".join(path.name for path in settings.train_file)
        train, validation = _from_files(settings, languages)
    else:
        train, validation = cldr_corpus(*languages, _VALIDATION_FRACTION, settings.seed)
        name = f"CLDR, written by Babel {version('babel')}"
    codes = (train.source_language, train.target_language)
    tokenizer = joint_tokenizer([*train.source, *train.target], settings.vocab_size, codes)
    lengths = {"max_source_length": settings.max_length, "max_target_length": settings.max_length}
    ids = [encode_parallel(side, tokenizer, **lengths, progress=False) for side in (train, validation)]
    return Corpora(name, train, validation, tokenizer, *ids)


def _from_files(settings: TranslationSettings, languages: tuple[str, str]) -> tuple[ParallelCorpus, ParallelCorpus]:
    if languages[0] == languages[1]:
        raise TyingError(f"The source and the target language are both {languages[0]!r}: give two.")
    files = [read_translation_json(path, *languages) for path in settings.train_file]
    pairs = [pair for corpus in files for pair in zip(corpus.source, corpus.target, strict=True)]
    fraction = min(_VALIDATION_FRACTION, _MOST_HELD_OUT / len(pairs))
    sides = split_pairs((Pair(str(i), *pair) for i, pair in enumerate(pairs)), fraction, settings.seed)
    if not all(sides):
        raise TyingError(
            f"{len(pairs)} pairs are too few: {fraction:.0%} are held out, what repeats a line of these is left out, "
            f"and {len(sides[0])} are left to train on, {len(sides[1])} to validate on. Give more."
        )
    train, validation = (
        ParallelCorpus([pair.source for pair in side], [pair.target for pair in side], *languages) for side in sides
    )
    return train, validation
