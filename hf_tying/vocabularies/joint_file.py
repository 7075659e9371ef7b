"""`joint_vocabulary.json`, the file of a `JointTokenizer`: writing, reading, and a check against its tokenizers."""

import json
from pathlib import Path

from ..config import TyingError
from .joint import JointVocabulary, VocabularySide

_VERSION = 1
_MOST_ROWS = 10_000_000  # a file with more rows is refused, because every row gets a name in memory


def write_joint_file(joint: JointVocabulary, file: Path) -> None:
    """Write the ids of `joint`, as a list from each source id to its joint id (null for an id without a word).

    Args:
        joint: ids of the joint vocabulary.
        file: JSON file to write.
    """
    ids = joint.source_ids
    content = {
        "version": _VERSION,
        "target_size": joint.target_size,
        "source_ids": [ids.get(index) for index in range(max(ids) + 1)],
    }
    file.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_joint_file(file: str | None) -> JointVocabulary:
    """Read the ids that `write_joint_file` wrote.

    Args:
        file: JSON file; `None` if a tokenizer was saved without it.

    Raises:
        TyingError: there is no file, or it is not a joint vocabulary, has a newer version, or has too many rows.
    """
    if file is None:
        raise TyingError(
            "A JointTokenizer without its ids: expected a folder with joint_vocabulary.json, as save_pretrained "
            "writes it."
        )
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        version, size, ids = content["version"], content["target_size"], content["source_ids"]
    except (ValueError, KeyError, TypeError) as error:
        raise TyingError(f"{file} is not a joint vocabulary ({error!r}). Save the tokenizer again.") from error
    if version != _VERSION:
        raise TyingError(f"{file} has version {version!r}: this hf_tying reads {_VERSION}. Upgrade hf-tying.")
    numbers = [size, *(index for index in ids if index is not None)] if isinstance(ids, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise TyingError(f"{file} is not a joint vocabulary: expected target_size and source_ids as numbers from 0.")
    if size + len(ids) > _MOST_ROWS:
        raise TyingError(f"{file} has {size + len(ids)} rows: no vocabulary has more than {_MOST_ROWS}.")
    return JointVocabulary(size, {source: joint for source, joint in enumerate(ids) if joint is not None})


def check_fit(joint: JointVocabulary, source: VocabularySide, target: VocabularySide) -> None:
    """Refuse ids that do not belong to these tokenizers, for example because one of them has changed.

    Args:
        joint: ids of the joint vocabulary.
        source: vocabulary of the source side.
        target: vocabulary of the target side.

    Raises:
        TyingError: a word of a side has no row, or an id of the source has no word.
    """
    lost = [word for index, word in source.words.items() if index not in joint.source_ids]
    extra = joint.source_ids.keys() - source.words.keys()
    over = [word for index, word in target.words.items() if index >= joint.target_size]
    if lost or extra or over:
        raise TyingError(
            f"The joint vocabulary does not fit its tokenizers: {len(lost)} source words without an id, {len(extra)} "
            f"ids without a source word, {len(over)} target words beyond row {joint.target_size - 1}. Join the "
            "vocabularies again with these tokenizers."
        )
