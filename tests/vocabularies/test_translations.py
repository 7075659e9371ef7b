"""From a text to the text that a model generates: the same before its vocabularies are joined and afterwards."""

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_tying import tie
from hf_tying.vocabularies import join_vocabularies
from hf_tying.vocabularies.tokenizer import register

from ..tiny_translation import part_config
from .two_vocabularies import ENGLISH, GERMAN, byte_level, reopened, wordpiece


def untrained(kind: str, source, target) -> EncoderDecoderModel:
    encoder = part_config("bert", False, len(source), pad_token_id=source.pad_token_id)
    family = kind.removeprefix("bert2")
    decoder = part_config(family, True, len(target), pad_token_id=target.pad_token_id)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    ends = (target.bos_token_id, target.eos_token_id) if family == "gpt2" else (2, 3)  # [CLS], [SEP]
    config.pad_token_id, (config.decoder_start_token_id, config.eos_token_id) = target.pad_token_id, ends
    torch.manual_seed(0)
    return EncoderDecoderModel(config)


def english(tokenizer) -> dict:
    return tokenizer(ENGLISH, padding=True, return_tensors="pt", return_token_type_ids=False).data


def german(tokenizer) -> torch.Tensor:
    labels = tokenizer(text_target=GERMAN, padding=True, return_tensors="pt")
    return labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)


def learn(model, inputs, labels, steps: int) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    starts = model.prepare_decoder_input_ids_from_labels(labels)
    for _ in range(steps):
        scores = model(**inputs, decoder_input_ids=starts).logits
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return loss.item()


def translated(model, tokenizer, beams: int) -> torch.Tensor:
    return model.generate(**english(tokenizer), num_beams=beams, max_new_tokens=24)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert2gpt2", "bert2bert"])
def test_a_trained_model_translates_as_before_and_is_tied_trained_on_and_reopened(kind, tmp_path):
    source = wordpiece(ENGLISH)
    target = byte_level(GERMAN) if kind == "bert2gpt2" else wordpiece(GERMAN, 110)
    model = untrained(kind, source, target)
    learn(model, english(source), german(target), steps=120)
    old = {n: target.batch_decode(translated(model, source, n), skip_special_tokens=True) for n in (1, 3)}
    expected = target.batch_decode(target(GERMAN)["input_ids"], skip_special_tokens=True)
    assert sum(a == b for a, b in zip(old[1], expected, strict=True)) >= 4  # it has learnt something
    model, tokenizer = join_vocabularies(model, source, target)
    for beams, texts in old.items():
        assert tokenizer.batch_decode(translated(model, tokenizer, beams), skip_special_tokens=True) == texts
    tie(model, "three_way", init_from="target", tokenizer=tokenizer, target_tokenizer=tokenizer)
    assert learn(model, english(tokenizer), german(tokenizer), steps=20) < 1
    model.save_pretrained(tmp_path)
    again, words = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), reopened(tokenizer, tmp_path)
    assert any(len(group.names) >= 3 for group in again.tie_groups)
    assert torch.equal(translated(again, words, 3), translated(model, tokenizer, 3))


def test_a_seq2seq_trainer_takes_a_joint_tokenizer(tmp_path):
    source, target = wordpiece(ENGLISH), byte_level(GERMAN)
    model, tokenizer = join_vocabularies(untrained("bert2gpt2", source, target), source, target)
    tie(model, "three_way", init_from="target")
    data = [dict(tokenizer(e, text_target=g)) for e, g in zip(ENGLISH, GERMAN, strict=True)]
    texts = []

    def read(predicted) -> dict:
        labels = torch.tensor(predicted.label_ids)
        labels = labels.masked_fill(labels == -100, tokenizer.pad_token_id)
        texts.extend(tokenizer.batch_decode(labels, skip_special_tokens=True))
        return {"lines": len(tokenizer.batch_decode(predicted.predictions, skip_special_tokens=True))}

    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, save_steps=2, predict_with_generate=True,
        generation_max_length=8, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model), compute_metrics=read,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_lines"] == len(texts) == len(ENGLISH)
    assert texts == GERMAN
    register()
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint-2").get_vocab() == tokenizer.get_vocab()
