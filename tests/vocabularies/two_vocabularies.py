"""Tokenizers of a few sentences, for tests of joint vocabularies."""

import io
import json
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_tying.ties.vocabulary import vocabularies_of
from hf_tying.vocabularies.joint import VocabularySide
from hf_tying.vocabularies.tokenizer import register

from ..tiny_translation import VOCAB

TARGET = 80

ENGLISH = [
    "the dog is running home.",
    "a cat was sleeping here.",
    "dogs and cats run and sleep.",
    "the house is red, the dog is not.",
    "we sing and dance at home",
    "he is singing a song about a red house",
    "a finger on the ring",
]
GERMAN = [
    "der Hund läuft nach Hause.",
    "eine Katze schlief hier.",
    "Hunde und Katzen laufen und schlafen.",
    "das Haus ist rot, der Hund ist es nicht.",
    "wir singen und tanzen zu Hause",
    "er singt ein Lied von einem roten Haus",
    "ein Finger am Ring, in der Hand",
]
PAD_FIRST = ["<pad>", "<s>", "</s>", "<unk>"]  # the ids of the joined models in tests/tiny_translation.py
BOS_FIRST = ["<s>", "<pad>", "</s>", "<unk>"]  # those of the others


def fast(tokenizer: Tokenizer, special: list[str], bert: bool) -> PreTrainedTokenizerFast:
    by_name = {word.strip("<>[]").lower(): word for word in special}
    start, end = (by_name["cls"], by_name["sep"]) if bert else (None, by_name.get("/s") or by_name["|endoftext|"])
    ids = [(word, tokenizer.token_to_id(word)) for word in (start, end) if word]
    template = f"{start} $A {end}" if bert else f"$A {end}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    roles_of = {"pad": "pad", "unk": "unk", **({"cls": "cls", "sep": "sep"} if bert else {"bos": "s", "eos": "/s"})}
    named = {f"{role}_token": by_name[name] for role, name in roles_of.items() if name in by_name}
    if "|endoftext|" in by_name:
        named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>") | named
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **named)


def wordpiece(texts, size=90, special=("[PAD]", "[UNK]", "[CLS]", "[SEP]")) -> PreTrainedTokenizerFast:
    """Letters, then the words and endings that occur most: `WordPieceTrainer` gives another vocabulary in each run."""
    splitter = pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    letters = {f"##{letter}" if place else letter for word in words for place, letter in enumerate(word)}
    pieces = Counter({word: count for word, count in words.items() if len(word) > 1})
    for word, count in words.items():
        for start in range(1, len(word) - 1):
            pieces[f"##{word[start:]}"] += count
    often = sorted(pieces, key=lambda piece: (-pieces[piece], -len(piece), piece))
    vocabulary = [*special, *sorted(letters), *often][:size]
    unknown = next(word for word in special if "unk" in word.lower())
    model = models.WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token=unknown)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(list(special))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    return fast(tokenizer, list(special), bert="[CLS]" in special)


def byte_level(texts, size=330, special=("<|endoftext|>", "<pad>"), alphabet=True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    initial = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=initial, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return fast(tokenizer, list(special), bert=False)


def tokenizers_for(arch: str, source_rows: int = VOCAB, target_rows: int = TARGET):
    """A WordPiece vocabulary for the source and a byte-level one for the target, with the model's special ids."""
    special = PAD_FIRST if "2" in arch else BOS_FIRST
    source = wordpiece(ENGLISH, source_rows, special)
    target = byte_level(GERMAN, target_rows, special, alphabet=False)
    assert (len(source), len(target)) == (source_rows, target_rows)
    return source, target


def marian_tokenizer(folder: Path, source_words: int = 60, target_words: int = 74):
    """A `MarianTokenizer` with two vocabularies, over two SentencePiece models; needs sentencepiece."""
    import sentencepiece
    from transformers import MarianTokenizer

    files = {}
    for side, texts, size in (("source", ENGLISH, source_words), ("target", GERMAN, target_words)):
        buffer = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=buffer, vocab_size=size, model_type="bpe", minloglevel=2
        )
        pieces = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
        words = [pieces.id_to_piece(index) for index in range(size)]
        words = ["</s>", "<pad>", *(word for word in words if word not in ("<s>", "</s>"))]
        files[f"{side}_spm"] = folder / f"{side}.spm"
        files[f"{side}_spm"].write_bytes(buffer.getvalue())
        files[side] = folder / f"{side}.json"
        files[side].write_text(json.dumps({word: index for index, word in enumerate(words)}))
    return MarianTokenizer(
        source_spm=str(files["source_spm"]), target_spm=str(files["target_spm"]), vocab=str(files["source"]),
        target_vocab_file=str(files["target"]), separate_vocabs=True, source_lang="en", target_lang="de",
    )  # fmt: skip


def fsmt_tokenizer(folder: Path):
    """An `FSMTTokenizer` with two vocabularies over common merges; needs sacremoses."""
    from transformers import FSMTTokenizer

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=110, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator([*ENGLISH, *GERMAN], trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    (folder / "merges.txt").write_text("".join(f"{' '.join(merge)}\n" for merge in merges))
    for name, texts in (("src", ENGLISH), ("tgt", GERMAN)):
        used = sorted({word for text in texts for word in tokenizer.encode(text).tokens})
        words = {word: index for index, word in enumerate([*BOS_FIRST, *used])}
        (folder / f"vocab-{name}.json").write_text(json.dumps(words))
    return FSMTTokenizer(
        langs=["en", "de"], src_vocab_file=str(folder / "vocab-src.json"),
        tgt_vocab_file=str(folder / "vocab-tgt.json"), merges_file=str(folder / "merges.txt"),
    )  # fmt: skip


def sides(source, target) -> tuple[VocabularySide, VocabularySide]:
    """Two tokenizers as the two sides of a joint vocabulary."""
    return VocabularySide(source, vocabularies_of(source)[0]), VocabularySide(target, vocabularies_of(target)[1])


def reopened(tokenizer, folder: Path):
    """`tokenizer`, saved and opened by `AutoTokenizer`."""
    register()
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
