"""What a translation model is told by its tokenizers: sizes, special ids, language codes, the decoder's inputs."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedTokenizerFast,
    TrainerState,
)

from hf_tying import TyingError
from hf_tying.data import train_byte_level_bpe
from hf_tying.data.tokenizers import joint_tokenizer
from hf_tying.training.translation import (
    TwoTokenizersCallback,
    check_fit,
    fill_special_ids,
    freeze_what_no_file_keeps,
    rows_needed,
    special_ids,
    target_tokenizer_beside,
    translation_collator,
    translation_config,
    use_languages,
)

from ..tiny_translation import STOCK, joined_config
from ..tiny_translation import translation_config as tiny_config

LINES = ["Two dogs run.", "Zwei Hunde laufen."] * 3
PAD, BOS, EOS = 0, 1, 2
#: What a type starts its decoder with, from transformers' documentation of each.
STARTS = {
    "marian": PAD, "pegasus": PAD, "prophetnet": PAD, "t5": PAD, "mt5": PAD, "umt5": PAD, "switch_transformers": PAD,
    "bart": EOS, "mbart": EOS, "m2m_100": EOS, "plbart": EOS, "led": EOS, "fsmt": EOS, "blenderbot-small": BOS,
}  # fmt: skip
FORCED_EOS = {"marian", "pegasus", "bart", "mbart", "plbart", "fsmt", "blenderbot-small"}


@pytest.fixture(scope="module")
def tokenizer():
    return joint_tokenizer(LINES, 275, ["en", "de"])


@pytest.fixture(scope="module")
def other():
    return train_byte_level_bpe(LINES, 262)


@pytest.fixture(scope="module")
def bert():
    """A tokenizer that has [CLS] and [SEP] in place of a beginning and an end."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokens = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def test_the_table_of_starts_has_every_stock_type():
    assert STARTS.keys() == set(STOCK) - {"marian_separate"}


@pytest.mark.parametrize("model_type", STARTS)
def test_a_config_has_the_ids_and_the_size_of_the_tokenizer(model_type, tokenizer):
    config = translation_config(model_type, tokenizer)
    assert (config.pad_token_id, config.eos_token_id) == (PAD, EOS)
    assert config.decoder_start_token_id == STARTS[model_type]
    assert getattr(config, "forced_eos_token_id", None) == (EOS if model_type in FORCED_EOS else None)
    sizes = {name: getattr(config, name, 275) for name in ("vocab_size", "decoder_vocab_size", "tgt_vocab_size")}
    assert set(sizes.values()) == {len(tokenizer)} == {275}
    generation = GenerationConfig.from_model_config(config)
    assert (generation.decoder_start_token_id, generation.pad_token_id) == (STARTS[model_type], PAD)


def test_two_tokenizers_make_two_vocabularies_where_a_type_can_have_them(tokenizer, other):
    marian = translation_config("marian", tokenizer, other)
    assert (marian.vocab_size, marian.decoder_vocab_size) == (275, 262)
    assert marian.share_encoder_decoder_embeddings is False
    assert marian.decoder_start_token_id == marian.pad_token_id == other.eos_token_id  # it has no padding
    fsmt = translation_config("fsmt", tokenizer, other)
    assert (fsmt.src_vocab_size, fsmt.tgt_vocab_size) == (275, 262)
    assert translation_config("marian", tokenizer, tokenizer).share_encoder_decoder_embeddings is True
    with pytest.raises(TyingError, match="'bart' has one vocabulary, and there are two tokenizers"):
        translation_config("bart", tokenizer, other)


@pytest.mark.parametrize(
    "model_type, message", [("gpt2", "is no translation"), ("encoder-decoder", "is no"), ("x", "no")]
)
def test_a_type_that_translates_nothing_is_refused(model_type, message, tokenizer):
    with pytest.raises(TyingError, match=f"{message}.*expected such as marian, bart or t5"):
        translation_config(model_type, tokenizer)


def test_a_tokenizer_without_a_beginning_or_padding_has_stand_ins(tokenizer, other, bert):
    assert special_ids(tokenizer) == {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    assert special_ids(bert) == {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    assert special_ids(other) == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def test_joined_models_are_told_what_nobody_told_them_and_keep_the_rest(bert):
    config = joined_config("bert2bert")
    config.pad_token_id = config.decoder_start_token_id = None  # as `from_encoder_decoder_configs` leaves them
    model = AutoModelForSeq2SeqLM.from_config(config)
    model.generation_config.eos_token_id = 7
    fill_special_ids(model, bert)
    assert (model.config.decoder_start_token_id, model.config.pad_token_id) == (2, 0)
    assert (model.generation_config.decoder_start_token_id, model.generation_config.eos_token_id) == (2, 7)
    marian = AutoModelForSeq2SeqLM.from_config(tiny_config("marian"))
    before = marian.config.to_dict(), marian.generation_config.to_dict()
    fill_special_ids(marian, bert)
    assert (marian.config.to_dict(), marian.generation_config.to_dict()) == before


@pytest.mark.parametrize(
    "make, source, target, model_type",
    [
        (MBartTokenizer, "en_XX", "de_DE", "mbart"),
        (MBart50Tokenizer, "en_XX", "de_DE", "mbart"),
        (NllbTokenizer, "eng_Latn", "deu_Latn", "m2m_100"),
    ],
)
def test_the_language_code_begins_the_translation(make, source, target, model_type):
    tokenizer = make()
    model = AutoModelForSeq2SeqLM.from_config(tiny_config(model_type, vocab_size=len(tokenizer)))
    use_languages(model, tokenizer, source, target)
    code = tokenizer.convert_tokens_to_ids(target)
    assert code in tokenizer(text_target="a")["input_ids"]
    assert tokenizer.convert_tokens_to_ids(source) in tokenizer("a")["input_ids"]
    out = model.generate(torch.tensor([tokenizer("a")["input_ids"]]), max_new_tokens=3)
    assert code in out[0, :2]  # mBART's first, the others' second after </s>
    for wrong in (("xx", target), (source, "xx"), (None, target), (source, None)):
        with pytest.raises(TyingError, match=f"{make.__name__} does not know both .*expected its own codes"):
            use_languages(model, tokenizer, *wrong)


def test_a_tokenizer_that_raises_for_an_unknown_code_is_answered_alike():
    class LikeM2M100(NllbTokenizer):  # that one needs a SentencePiece file
        def set_tgt_lang_special_tokens(self, lang):
            raise KeyError(lang)

    with pytest.raises(TyingError, match="LikeM2M100 does not know both eng_Latn and xx"):
        use_languages(SimpleNamespace(), LikeM2M100(), "eng_Latn", "xx")


def test_a_tokenizer_that_knows_no_languages_changes_nothing(tokenizer):
    model = SimpleNamespace()  # nothing of it is asked for
    use_languages(model, tokenizer, "en", "xx")


@pytest.fixture
def rows(tokenizer):
    pairs = [("Two dogs run.", "Hunde"), ("Two", "Zwei Hunde laufen. Zwei.")]
    return [{"input_ids": tokenizer(a)["input_ids"], "labels": tokenizer(b)["input_ids"]} for a, b in pairs]


@pytest.mark.parametrize("arch", STOCK)
def test_the_decoders_inputs_are_the_labels_shifted_right(arch, tokenizer, rows):
    sizes = dict(vocab_size=275, src_vocab_size=275, tgt_vocab_size=275) if arch == "fsmt" else dict(vocab_size=275)
    ids = dict(pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=STARTS.get(arch, PAD))
    model = AutoModelForSeq2SeqLM.from_config(tiny_config(arch, **sizes, **ids)).eval()
    batch = translation_collator(model, tokenizer)([dict(row) for row in rows])
    # FSMT's own shift would count the padding as words.
    assert [[i for i in row if i != -100] for row in batch["labels"].tolist()] == [row["labels"] for row in rows]
    assert (batch["labels"] == -100).sum() > 0
    for inputs, row in zip(batch["decoder_input_ids"].tolist(), rows, strict=True):
        assert inputs[: len(row["labels"])] == [ids["decoder_start_token_id"], *row["labels"][:-1]]
        assert min(inputs) >= 0
    if arch != "fsmt":  # without inputs it takes the source sentence, whatever the labels are
        with torch.no_grad():
            alone = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
            assert torch.equal(model(**batch).logits, alone.logits)


def test_a_side_without_rows_or_positions_enough_is_refused(tokenizer, other, bert):
    def model(**sizes):
        return AutoModelForSeq2SeqLM.from_config(tiny_config("marian_separate", **sizes))

    check_fit(model(vocab_size=275, decoder_vocab_size=262), tokenizer, other, 32, 32)
    with pytest.raises(TyingError, match="tokenizer of the source side has 275 tokens and the source embedding 274"):
        check_fit(model(vocab_size=274, decoder_vocab_size=262), tokenizer, other, 32, 32)
    with pytest.raises(TyingError, match="tokenizer of the target side has 262 tokens and the target embedding 261"):
        check_fit(model(vocab_size=275, decoder_vocab_size=261), tokenizer, other, 32, 32)
    with pytest.raises(TyingError, match="A target sentence may have 33 tokens and the model has 32 positions"):
        check_fit(model(vocab_size=275, decoder_vocab_size=262), tokenizer, other, 32, 33)
    for rows in (275, 274):
        split = model(vocab_size=rows, decoder_vocab_size=262)
        for parameter in split.parameters():  # as ZeRO-3 leaves them
            parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
        with nullcontext() if rows == 275 else pytest.raises(TyingError, match="the source embedding 274 rows"):
            check_fit(split, tokenizer, other, 32, 32)
    joined = AutoModelForSeq2SeqLM.from_config(joined_config("bert2gpt2"))
    with pytest.raises(TyingError, match="A source sentence may have 33 tokens"):
        check_fit(joined, bert, bert, 33, 32)


def test_rows_and_start_of_a_model_from_scratch(tokenizer):
    class WithCodes(PreTrainedTokenizerFast):  # as M2M100's, whose codes its vocabulary does not count
        lang_token_to_id = {"__en__": 280, "__fr__": 281}

    coded = WithCodes(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>")
    assert len(coded) == 275 and rows_needed(coded) == 282 and rows_needed(tokenizer) == 275
    assert translation_config("m2m_100", coded).vocab_size == 282
    config = translation_config("marian", tokenizer, d_model=64)
    assert config.scale_embedding is True and config.init_std == 1 / 8
    assert translation_config("marian", tokenizer, init_std=0.5, scale_embedding=False).init_std == 0.5
    assert not hasattr(translation_config("t5", tokenizer), "init_std")


def test_two_tokenizers_stay_with_every_checkpoint_and_with_the_model(tokenizer, other, tmp_path):
    callback = TwoTokenizersCallback(tokenizer, other)
    args, state = SimpleNamespace(output_dir=str(tmp_path)), TrainerState(global_step=7)
    callback.on_save(args, state, None)
    callback.on_train_end(args, state, None)
    for folder in (tmp_path, tmp_path / "checkpoint-7"):
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
        assert target_tokenizer_beside(folder).get_vocab() == other.get_vocab()
    assert target_tokenizer_beside(tmp_path / "decoder_tokenizer") is None
    state.is_world_process_zero, args.output_dir = False, str(tmp_path / "second")
    callback.on_train_end(args, state, None)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("model_type", ["marian", "bart", "t5"])
def test_a_loaded_model_trains_what_a_model_from_scratch_trains(model_type, tmp_path):
    scratch = AutoModelForSeq2SeqLM.from_config(tiny_config(model_type))
    scratch.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    freeze_what_no_file_keeps(loaded)
    trained, again = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (scratch, loaded))
    assert trained == again
