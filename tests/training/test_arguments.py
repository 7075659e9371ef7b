"""`TyingArguments` as flags beside `TrainingArguments`, and what they declare."""

import dataclasses
import json
import re
from functools import partial

import pytest
from transformers import AutoConfig, HfArgumentParser, TrainingArguments

from hf_tying import TyingConfig, TyingError
from hf_tying.training import ObjectiveArguments, ScriptParser, TyingArguments, config_with_overrides

GROUPS = {"layers": ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]}


def parse(*flags):
    parser = HfArgumentParser((TrainingArguments, TyingArguments))
    return parser.parse_args_into_dataclasses([*flags, "--output_dir", "out"])[1]


def test_no_flag_declares_nothing():
    assert parse().to_tying_config() is None


def test_flags_become_the_declaration():
    flags = ["--scheme", "two_way", "--save_format", "portable", "--on_conflict", "keep_untied"]
    expected = TyingConfig(scheme="two_way", save_format="portable", on_conflict="keep_untied")
    assert parse(*flags).to_tying_config() == expected


@pytest.mark.parametrize("name", ["groups.json", "groups.yaml"])
def test_groups_come_from_a_file_beside_a_scheme_or_alone(name, tmp_path):
    (tmp_path / name).write_text(json.dumps(GROUPS))  # JSON is YAML too
    file = str(tmp_path / name)
    assert parse("--groups_file", file).to_tying_config() == TyingConfig(groups=GROUPS)
    both = parse("--groups_file", file, "--scheme", "two_way").to_tying_config()
    assert both == TyingConfig(scheme="two_way", groups=GROUPS)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        (b"{", "cannot be read"),
        (b"a: [b", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1, 2]", "does not hold a mapping"),
        (b"{}", "does not hold a mapping"),
        (b'{"alone": ["a.weight"]}', "a tie needs at least two"),
    ],
)
def test_a_bad_groups_file_is_named(content, message, tmp_path):
    file = tmp_path / "groups.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TyingError, match=message):
        TyingArguments(groups_file=str(file)).to_tying_config()


def test_an_unknown_scheme_is_refused_on_the_command_line_and_in_a_file(capsys):
    with pytest.raises(SystemExit):
        parse("--scheme", "two-way")
    assert "invalid choice: 'two-way'" in capsys.readouterr().err
    with pytest.raises(TyingError, match="Unknown tying scheme 'two-way'"):
        TyingArguments(scheme="two-way").to_tying_config()


def test_the_flags_on_training_become_the_callback():
    flags = ["--log_roles", "--untie_at", "0.5", "--freeze", "input", "--freeze_until", "0.25"]
    callback = parse(*flags, "--input_gradient_scale", "5").to_callback()
    assert callback.log_roles is True and (callback.untie_at, callback.freeze_until) == (0.5, 0.25)
    assert (callback.freeze, callback.input_gradient_scale) == ("input", 5.0)
    plain = parse().to_callback()
    assert plain.log_roles is False and plain.untie_at is plain.freeze is plain.input_gradient_scale is None
    with pytest.raises(TyingError, match="freeze"):
        parse("--freeze", "encoder").to_callback()


@pytest.mark.parametrize("field", dataclasses.fields(TyingArguments), ids=lambda field: field.name)
def test_a_flag_has_its_long_name_too_with_dashes_or_underscores(field):
    value = {"scheme": "two_way", "save_format": "dedup", "loss": "tied"}.get(field.name, "1")
    expected = getattr(parse(f"--{field.name}", value), field.name)
    long = f"--tying_{field.name}"
    for flag in (long, long.replace("_", "-")):
        assert getattr(parse(flag, value), field.name) == expected != field.default


def test_every_flag_has_its_help():
    assert all(len(field.metadata["help"]) > 40 for field in dataclasses.fields(TyingArguments))


def test_the_help_has_a_part_for_each_class_and_one_spelling_of_each_flag():
    parser = ScriptParser((TrainingArguments, TyingArguments, ObjectiveArguments), description="one\n    two")
    text = parser.format_help()
    parts = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert parts == ["ties", "objective", "training, by transformers"]
    assert "one\n    two" in text
    assert (
        re.search(r"^ +--untie_at UNTIE_AT( |$)", text, re.MULTILINE)
        and "--tying_untie_at" not in text
        and "--untie-at" not in text
    )
    assert "(default: stock)" in text and "(default: None)" not in text
    assert parser.parse(["--tying-untie-at", "0.5"])[1].untie_at == 0.5
    assert "by transformers" not in ScriptParser((TyingArguments, ObjectiveArguments)).format_help()


# --- overrides of a config -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type, overrides", [
    ("llama", "hidden_size=64,num_attention_heads=4"), ("qwen3", "num_hidden_layers=2"),
    ("gemma3_text", "num_hidden_layers=2"), ("t5", "num_layers=1"), ("mamba", "hidden_size=64"),
    ("olmo2", "hidden_size=64,num_attention_heads=4"), ("xlnet", "d_model=64,n_head=4"), ("gpt2", "n_embd=64"),
])  # fmt: skip
def test_overrides_give_the_config_that_its_constructor_gives(model_type, overrides):
    given = {key: int(value) for key, value in (pair.split("=") for pair in overrides.split(","))}
    found = config_with_overrides(partial(AutoConfig.for_model, model_type, vocab_size=99), overrides)
    assert found.to_dict() == AutoConfig.for_model(model_type, vocab_size=99, **given).to_dict()
    assert found.to_dict() != AutoConfig.for_model(model_type, vocab_size=99).to_dict()


def test_a_key_that_the_config_has_not_is_refused_with_the_nearest():
    with pytest.raises(TyingError, match="key 'hiden_size' is not in .*nearest names are 'hidden_size'"):
        config_with_overrides(partial(AutoConfig.for_model, "llama"), "hiden_size=64")


def test_no_overrides_leave_a_config_as_it_is():
    make = partial(AutoConfig.for_model, "llama", hidden_size=64)
    assert config_with_overrides(make, None).to_dict() == make().to_dict()
