"""The tokenizer of a joint vocabulary: `JointTokenizer` for any two tokenizers, or a stock class if that can do it."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from transformers import AddedToken, AutoTokenizer, BatchEncoding, PreTrainedConfig, PreTrainedTokenizer
from transformers.tokenization_utils_base import PaddingStrategy, PreTrainedTokenizerBase, TruncationStrategy

from ..config import TyingError
from ..ties.vocabulary import vocabularies_of
from .joint import JointVocabulary, VocabularySide, row_names
from .joint_file import check_fit, read_joint_file, write_joint_file
from .stock_tokenizer import with_one_vocabulary

_WHERE = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "token",
)  # arguments that find the files of a checkpoint


class JointTokenizer(PreTrainedTokenizer):
    """Two tokenizers with one vocabulary. `join_vocabularies` makes it, and it is used like any tokenizer.

    The source tokenizer splits a text and adds its special tokens; the target tokenizer does so for a `text_target`.
    The result is ids of the joint vocabulary: the target side's own ids, and after them those of words that only the
    source has. Ids are decoded by the tokenizer of a side that has all of them, the target first. Ids of both sides
    together are decoded by the target's conventions. The files of the two tokenizers are in the folders
    `source_tokenizer` and `target_tokenizer`, and can be loaded by themselves.

    `AutoTokenizer.from_pretrained` loads a saved one after `import hf_tying`. No code from a checkpoint is run.

    Args:
        source_tokenizer: any transformers tokenizer. Padding and truncation are on its sides.
        target_tokenizer: any transformers tokenizer. The length limit is the smaller one of the two.
        joint (`JointVocabulary`): ids of the joint vocabulary.
        joint_file (`str`): file of `joint`, from `from_pretrained`.
        **kwargs: arguments of any tokenizer.

    Raises:
        TyingError: the ids do not fit the tokenizers, the file is missing or broken, or the target tokenizer cannot
            split text of the target (FSMT's tokenizer, which has no such mode).
    """

    vocab_files_names = {"joint_file": "joint_vocabulary.json"}

    def __init__(
        self,
        source_tokenizer: PreTrainedTokenizerBase | None = None,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
        joint: JointVocabulary | None = None,
        joint_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        if source_tokenizer is None or target_tokenizer is None:
            raise TyingError("A JointTokenizer is made of two: expected source_tokenizer and target_tokenizer.")
        if _splits_source_only(target_tokenizer):
            raise TyingError(
                f"{type(target_tokenizer).__name__} splits text of its source side only, and cannot be the target of "
                "a JointTokenizer. Join with overlap='word' or 'spelling', which gives it one vocabulary for both."
            )
        self.joint = read_joint_file(joint_file) if joint is None else joint
        self.source_tokenizer, self.target_tokenizer = source_tokenizer, target_tokenizer
        source = VocabularySide(source_tokenizer, vocabularies_of(source_tokenizer)[0])
        target = VocabularySide(target_tokenizer, vocabularies_of(target_tokenizer)[1])
        check_fit(self.joint, source, target)
        self._names, self._written = row_names(source, target, self.joint)
        self._ids = {name: index for index, name in self._names.items()}
        self._for_target = False
        for name, value in {**self._special_tokens(source, target), **self._limits()}.items():
            kwargs.setdefault(name, value)
        super().__init__(**kwargs)

    def _special_tokens(self, source: VocabularySide, target: VocabularySide) -> dict[str, Any]:
        """The token of each role: the target's if it has one; for padding the source's, because it pads texts."""
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
        """The number of rows of the model's matrices, with rows that have no word."""
        return self.joint.size

    def get_vocab(self) -> dict[str, int]:
        """Return a dict from each word to its id. A word of the source is spelled by the target's convention."""
        return dict(self._ids)

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
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
                f"{index} is not an id of this vocabulary: expected 0 to {self.joint.size - 1}. Replace the -100 of "
                "labels by the padding token first."
            )
        return self._names[index]

    # --- from text to ids --------------------------------------------------------------------------------------------

    def _switch_to_input_mode(self) -> None:
        self._for_target = False

    def _switch_to_target_mode(self) -> None:
        self._for_target = True

    def _encode_plus(
        self,
        text: str | list,
        text_pair: str | list | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        **kwargs: Any,
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

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Split a text of the source side into words of the joint vocabulary.

        Args:
            text: text of the source side.
            pair: second text. Default: none.
            add_special_tokens: whether to add special tokens. Default `False`.
            **kwargs: further arguments of a tokenizer's call.
        """
        encoded = self._encode_plus(text, pair, add_special_tokens=add_special_tokens, **kwargs)
        return self.convert_ids_to_tokens(encoded["input_ids"])

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return the number of special tokens that the source tokenizer adds."""
        return self.source_tokenizer.num_special_tokens_to_add(pair)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Refuse to add special tokens to ids. Each side's tokenizer adds its special tokens to a text.

        Args:
            token_ids_0: ids of a text.
            token_ids_1: ids of a second text.

        Raises:
            TyingError: always.
        """
        raise TyingError("Special tokens cannot be added to ids of a joint vocabulary: call the tokenizer on a text.")

    # --- from ids to text --------------------------------------------------------------------------------------------

    def _decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        self.convert_ids_to_tokens(ids)  # refuses numbers that are not ids
        if all(index < self.joint.target_size for index in ids):
            return self.target_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)
        back = self.joint.joint_to_source
        if all(index in back for index in ids):
            ids = [back[index] for index in ids]
            return self.source_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)
        return super()._decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join words of the joint vocabulary to a text by the target's conventions."""
        written = [self._written[self._ids[token]] if token in self._ids else token for token in tokens]
        return self.target_tokenizer.convert_tokens_to_string(written)

    # --- files -------------------------------------------------------------------------------------------------------

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the ids, and the two tokenizers in folders of their own.

        Args:
            save_directory: folder.
            filename_prefix: start of the name of the file of ids. Default: none.

        Returns:
            The names of all files.
        """
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        file = Path(save_directory) / f"{prefix}{self.vocab_files_names['joint_file']}"
        write_joint_file(self.joint, file)
        files = [str(file)]
        for side in ("source_tokenizer", "target_tokenizer"):
            files += getattr(self, side).save_pretrained(Path(save_directory) / side)
        return tuple(files)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *init_inputs: Any, subfolder: str = "", **kwargs: Any
    ) -> Self:
        """Load a saved tokenizer. `AutoTokenizer` loads the two tokenizers inside, without remote code.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            *init_inputs: further positional arguments, as for any tokenizer.
            subfolder: folder inside the repository. Default: its root.
            **kwargs: further arguments, as for any tokenizer.
        """
        where = {key: kwargs[key] for key in _WHERE if key in kwargs}
        for side in ("source_tokenizer", "target_tokenizer"):
            if kwargs.get(side) is None:
                folder = f"{subfolder}/{side}" if subfolder else side
                kwargs[side] = AutoTokenizer.from_pretrained(
                    pretrained_model_name_or_path, subfolder=folder, trust_remote_code=False, **where
                )
        return super().from_pretrained(pretrained_model_name_or_path, *init_inputs, subfolder=subfolder, **kwargs)


class JointTokenizerConfig(PreTrainedConfig):
    """The key of `JointTokenizer` in `AutoTokenizer`. No model has this config."""

    model_type = "joint_tokenizer"


def register() -> None:
    """Register `JointTokenizer` with `AutoTokenizer.from_pretrained`."""
    AutoTokenizer.register(JointTokenizerConfig, JointTokenizer, exist_ok=True)


def tokenizer_over(
    joint: JointVocabulary,
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    overlap: str,
) -> PreTrainedTokenizerBase:
    """Make the tokenizer of a joint vocabulary: a stock tokenizer if its class allows it, else a `JointTokenizer`.

    Args:
        joint: ids of the joint vocabulary.
        source_tokenizer: tokenizer of the source side.
        target_tokenizer: tokenizer of the target side. It is the same one if it holds both vocabularies.
        overlap: rule by which `joint` was made.

    Raises:
        TyingError: see `JointTokenizer`.
    """
    vocabularies = vocabularies_of(source_tokenizer)
    holds_both = vocabularies[0] != vocabularies[1] and vocabularies_of(target_tokenizer) == vocabularies
    if holds_both and type(source_tokenizer) is type(target_tokenizer) and overlap != "none":
        source, target = map(VocabularySide, (source_tokenizer, target_tokenizer), vocabularies)
        names, _ = row_names(source, target, joint)
        return with_one_vocabulary(source_tokenizer, {word: index for index, word in names.items()})
    return JointTokenizer(copy.deepcopy(source_tokenizer), copy.deepcopy(target_tokenizer), joint)


def _splits_source_only(tokenizer: PreTrainedTokenizerBase) -> bool:
    source, target = vocabularies_of(tokenizer)
    return source != target and not hasattr(tokenizer, "_switch_to_target_mode")
