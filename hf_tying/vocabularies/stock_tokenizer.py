"""Conversion of a stock tokenizer with two vocabularies (Marian, FSMT) to one with a single vocabulary."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def with_one_vocabulary(tokenizer: "PreTrainedTokenizerBase", vocabulary: dict[str, int]) -> "PreTrainedTokenizerBase":
    """Make a tokenizer of the same class and settings with one vocabulary for both sides.

    Args:
        tokenizer: a `MarianTokenizer` or `FSMTTokenizer`, which is not changed.
        vocabulary: map from each word to its id.

    Returns:
        The new tokenizer.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for key in ("vocab", "src_vocab_file", "tgt_vocab_file"):
            if name := tokenizer.vocab_files_names.get(key):
                Path(folder, name).write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        file = Path(folder, "tokenizer_config.json")
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # ids of the old source side
        if "separate_vocabs" in settings:
            settings["separate_vocabs"] = False
            Path(folder, tokenizer.vocab_files_names["target_vocab_file"]).unlink(missing_ok=True)
        file.write_text(json.dumps(settings), encoding="utf-8")
        joined = type(tokenizer).from_pretrained(folder)
    joined.name_or_path = tokenizer.name_or_path
    if hasattr(tokenizer, "spm_files"):
        joined.spm_files = list(tokenizer.spm_files)  # a copy in another process reads its pieces from there
    return joined
