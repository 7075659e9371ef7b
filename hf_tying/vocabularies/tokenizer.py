"""Tokenizers over a joint vocabulary: `JointTokenizer` for any two, and stock classes where they can do it."""

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer, BatchEncoding, PreTrainedConfig, PreTrainedTokenizer
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

from ..config import TyingError
from ..ties.vocabulary import vocabularies_of
from .joint import JointVocabulary, Side, joint_words

_VERSION = 1
_MOST_ROWS = 10_000_000  # a file that claims more is not read on: every row gets a name
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "token")  # what finds a checkpoint's files


class JointTokenizer(PreTrainedTokenizer):
    """Two tokenizers with one vocabulary: made by `join_vocabularies`, used like any tokenizer.

    A text is split by the source's tokenizer, with its special tokens; a `text_target` by the target's. What comes out
    are ids of the joint vocabulary: those of the target side unchanged, after them the words that only the source has.
    Ids are decoded by the tokenizer of the side that has them all, the target first; where both sides are mixed, by
    the target's conventions. The files of the two tokenizers lie in the folders `source_tokenizer` and
    `target_tokenizer`, and can be opened by themselves.

    `AutoTokenizer.from_pretrained` opens a saved one after `import hf_tying`. No code from a checkpoint is run.

    Args:
        source_tokenizer: any transformers tokenizer.
        target_tokenizer: another one; padding and truncation sides are those of the source's tokenizer, and the
            length limit the smaller one.
        joint (`JointVocabulary`): the ids.
        joint_file (`str`): the saved form of `joint`, given by `from_pretrained`.
        kwargs: as for any tokenizer.

    Raises:
        TyingError: when the ids do not fit the tokenizers, the file is missing or broken, or the target's tokenizer
            cannot split text of the target (FSMT's, which has no such mode).
    """

    vocab_files_names = {"joint_file": "joint_vocabulary.json"}

    def __init__(
        self,
        source_tokenizer=None,
        target_tokenizer=None,
        joint: JointVocabulary | None = None,
        joint_file: str | None = None,
        **kwargs,
    ):
        if source_tokenizer is None or target_tokenizer is None:
            raise TyingError("A JointTokenizer is made of two: expected source_tokenizer and target_tokenizer.")
        if _splits_source_only(target_tokenizer):
            raise TyingError(
                f"{type(target_tokenizer).__name__} splits text of its source side only, and cannot be the target of "
                "a JointTokenizer. Join with overlap='word' or 'spelling', which gives it one vocabulary for both."
            )
        self.joint = _read(joint_file) if joint is None else joint
        self.source_tokenizer, self.target_tokenizer = source_tokenizer, target_tokenizer
        source = Side(source_tokenizer, vocabularies_of(source_tokenizer)[0])
        target = Side(target_tokenizer, vocabularies_of(target_tokenizer)[1])
        _check_fit(self.joint, source, target)
        self._names, self._written = joint_words(source, target, self.joint)
        self._ids = {name: index for index, name in self._names.items()}
        self._for_target = False
        for name, value in {**self._special_tokens(source, target), **self._limits()}.items():
            kwargs.setdefault(name, value)
        super().__init__(**kwargs)

    def _special_tokens(self, source: Side, target: Side) -> dict[str, Any]:
        """Each role as the target has it, but padding as the source, whose text is what a tokenizer pads."""
        of_source = {index: self._names[self.joint.source_ids[index]] for index in source.words}
        named = {word: of_source[index] for index, word in source.words.items() if word in source.whole}
        mine = {role: named[word] for word, held in source.roles.items() for role in held if word in named}
        theirs = {role: word for word, held in target.roles.items() for role in held if word in self._ids}
        special = {**mine, **theirs}
        if "pad_token" in mine:
            special["pad_token"] = mine["pad_token"]
        every = [*(named[word] for word in self.source_tokenizer.all_special_tokens if word in named)]
        every += [word for word in self.target_tokenizer.all_special_tokens if word in self._ids]
        special["extra_special_tokens"] = [w for w in dict.fromkeys(every) if w not in special.values()]
        return special

    def _limits(self) -> dict[str, Any]:
        both = (self.source_tokenizer, self.target_tokenizer)
        return {
            "model_max_length": min(tokenizer.model_max_length for tokenizer in both),
            "model_input_names": self.source_tokenizer.model_input_names,
            "padding_side": self.source_tokenizer.padding_side,
            "truncation_side": self.source_tokenizer.truncation_side,
            "clean_up_tokenization_spaces": self.target_tokenizer.clean_up_tokenization_spaces,
        }

    # --- the vocabulary ----------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Words of the joint vocabulary, rows without a word included: the rows of the model's matrices."""
        return self.joint.size

    def get_vocab(self) -> dict[str, int]:
        """From each word to its id; a word of the source is named as the target's convention writes it."""
        return dict(self._ids)

    def _add_tokens(self, new_tokens, special_tokens: bool = False) -> int:
        for token in new_tokens:
            if str(token) not in self._ids:
                raise TyingError(
                    f"Cannot add {str(token)!r} to a joint vocabulary: each side splits text by its own tokenizer. "
                    "Add it to them, and a row to the model, before join_vocabularies."
                )
        return super()._add_tokens(new_tokens, special_tokens)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token, self._ids.get(self.special_tokens_map.get("unk_token")))

    def _convert_id_to_token(self, index: int) -> str:
        if index not in self._names:
            raise TyingError(
                f"{index} is no id of this vocabulary: expected 0 to {self.joint.size - 1}. Put the padding token in "
                "place of the -100 of labels first."
            )
        return self._names[index]

    # --- from text to ids --------------------------------------------------------------------------------------------

    def _switch_to_input_mode(self) -> None:
        self._for_target = False

    def _switch_to_target_mode(self) -> None:
        self._for_target = True

    def _encode_plus(
        self,
        text,
        text_pair=None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        **kwargs,
    ) -> BatchEncoding:
        tokenizer = self.target_tokenizer if self._for_target else self.source_tokenizer
        tokenizer.truncation_side = self.truncation_side
        texts = {"text": text, "text_pair": text_pair}
        if self._for_target:
            texts = {f"{name}_target": value for name, value in texts.items()}
        encoded = tokenizer(
            **texts,
            truncation=truncation_strategy,
            max_length=max_length,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )
        ids = encoded["input_ids"]
        batched = bool(ids) and isinstance(ids[0], list) or isinstance(text, list | tuple) and not len(text)
        encoded = dict(encoded)
        for key in {"input_ids", "overflowing_tokens"} & encoded.keys():
            encoded[key] = [self._joint_ids(row) for row in encoded[key]] if batched else self._joint_ids(encoded[key])
        encoded = self.pad(
            encoded,
            padding=padding_strategy,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
        )
        return BatchEncoding(dict(encoded), tensor_type=return_tensors, prepend_batch_axis=not batched)

    def _joint_ids(self, ids: list[int]) -> list[int]:
        return ids if self._for_target else [self.joint.source_ids[index] for index in ids]

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs) -> list[str]:
        """The words of the joint vocabulary that `text` is made of, as the source side splits it."""
        encoded = self._encode_plus(text, pair, add_special_tokens=add_special_tokens, **kwargs)
        return self.convert_ids_to_tokens(encoded["input_ids"])

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """As the source's tokenizer adds them."""
        return self.source_tokenizer.num_special_tokens_to_add(pair)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        """Not from ids: each side's tokenizer puts its special tokens in place when it is given a text.

        Raises:
            TyingError: always.
        """
        raise TyingError("Special tokens cannot be added to ids of a joint vocabulary: call the tokenizer on a text.")

    # --- from ids to text --------------------------------------------------------------------------------------------

    def _decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        self.convert_ids_to_tokens(ids)  # refuses what is no id
        if all(index < self.joint.target_size for index in ids):
            return self.target_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)
        back = self.joint.joint_to_source
        if all(index in back for index in ids):
            ids = [back[index] for index in ids]
            return self.source_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)
        return super()._decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text that words of the joint vocabulary make, by the target's conventions."""
        written = [self._written[self._ids[token]] if token in self._ids else token for token in tokens]
        return self.target_tokenizer.convert_tokens_to_string(written)

    # --- files -------------------------------------------------------------------------------------------------------

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """The ids, and the two tokenizers in folders of their own."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        file = Path(save_directory) / f"{prefix}{self.vocab_files_names['joint_file']}"
        ids = self.joint.source_ids
        content = {
            "version": _VERSION,
            "target_size": self.joint.target_size,
            "source_ids": [ids.get(index) for index in range(max(ids) + 1)],
        }
        file.write_text(json.dumps(content) + "\n", encoding="utf-8")
        files = [str(file)]
        for side in ("source_tokenizer", "target_tokenizer"):
            files += getattr(self, side).save_pretrained(Path(save_directory) / side)
        return tuple(files)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *init_inputs, subfolder: str = "", **kwargs):
        """As for any tokenizer; the two tokenizers inside are opened by `AutoTokenizer`, without remote code."""
        where = {key: kwargs[key] for key in _WHERE if key in kwargs}
        for side in ("source_tokenizer", "target_tokenizer"):
            if kwargs.get(side) is None:
                folder = f"{subfolder}/{side}" if subfolder else side
                kwargs[side] = AutoTokenizer.from_pretrained(
                    pretrained_model_name_or_path, subfolder=folder, trust_remote_code=False, **where
                )
        return super().from_pretrained(pretrained_model_name_or_path, *init_inputs, subfolder=subfolder, **kwargs)


class JointTokenizerConfig(PreTrainedConfig):
    """The key under which `AutoTokenizer` knows `JointTokenizer`; no model has this config."""

    model_type = "joint_tokenizer"


def register() -> None:
    """Make `AutoTokenizer.from_pretrained` know `JointTokenizer`."""
    AutoTokenizer.register(JointTokenizerConfig, JointTokenizer, exist_ok=True)


def tokenizer_over(joint: JointVocabulary, source_tokenizer, target_tokenizer, overlap: str):
    """The tokenizer of a joint vocabulary: a stock one where its class can have one, else a `JointTokenizer`.

    Args:
        joint: the ids.
        source_tokenizer: of the source side.
        target_tokenizer: of the target side; the same one where a tokenizer holds both.
        overlap: the rule that `joint` was made by.

    Raises:
        TyingError: see `JointTokenizer`.
    """
    vocabularies = vocabularies_of(source_tokenizer)
    holds_both = vocabularies[0] != vocabularies[1] and vocabularies_of(target_tokenizer) == vocabularies
    if holds_both and type(source_tokenizer) is type(target_tokenizer) and overlap != "none":
        names, _ = joint_words(Side(source_tokenizer, vocabularies[0]), Side(target_tokenizer, vocabularies[1]), joint)
        return _with_files(source_tokenizer, {word: index for index, word in names.items()})
    return JointTokenizer(copy.deepcopy(source_tokenizer), copy.deepcopy(target_tokenizer), joint)


def _with_files(tokenizer, vocabulary: dict[str, int]):
    """A tokenizer of the same class and settings with `vocabulary` for both sides."""
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
        joined.spm_files = list(tokenizer.spm_files)  # from where a copy in another process reads its pieces
    return joined


def _splits_source_only(tokenizer) -> bool:
    source, target = vocabularies_of(tokenizer)
    return source != target and not hasattr(tokenizer, "_switch_to_target_mode")


def _read(file: str | None) -> JointVocabulary:
    if file is None:
        raise TyingError(
            "A JointTokenizer without its ids: expected a folder with joint_vocabulary.json, as save_pretrained "
            "writes it."
        )
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        version, size, ids = content["version"], content["target_size"], content["source_ids"]
    except (ValueError, KeyError, TypeError) as error:
        raise TyingError(f"{file} is no joint vocabulary ({error!r}). Save the tokenizer again.") from error
    if version != _VERSION:
        raise TyingError(f"{file} has version {version!r}: this hf_tying reads {_VERSION}. Upgrade hf-tying.")
    numbers = [size, *(index for index in ids if index is not None)] if isinstance(ids, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise TyingError(f"{file} is no joint vocabulary: expected target_size and source_ids as numbers from 0 on.")
    if size + len(ids) > _MOST_ROWS:
        raise TyingError(f"{file} has {size + len(ids)} rows: no vocabulary has more than {_MOST_ROWS}.")
    return JointVocabulary(size, {source: joint for source, joint in enumerate(ids) if joint is not None})


def _check_fit(joint: JointVocabulary, source: Side, target: Side) -> None:
    """Every word of each side has a row; a tokenizer that has changed since does not pass for the one it was."""
    lost = [word for index, word in source.words.items() if index not in joint.source_ids]
    extra = joint.source_ids.keys() - source.words.keys()
    over = [word for index, word in target.words.items() if index >= joint.target_size]
    if lost or extra or over:
        raise TyingError(
            f"The joint vocabulary does not fit its tokenizers: {len(lost)} source words without an id, {len(extra)} "
            f"ids without a source word, {len(over)} target words beyond row {joint.target_size - 1}. Join the "
            "vocabularies again with these tokenizers."
        )
