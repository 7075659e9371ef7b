"""`TyingArguments` as flags beside `TrainingArguments`, and what they declare."""

import dataclasses
import json

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_tying import TyingConfig, TyingError
from hf_tying.training import TyingArguments

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
        (b"{", "cannot be parsed"),
        (b"a: [b", "cannot be parsed"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1, 2]", "holds no mapping of groups"),
        (b"{}", "holds no mapping of groups"),
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


def test_every_flag_has_its_help():
    assert all(len(field.metadata["help"]) > 40 for field in dataclasses.fields(TyingArguments))
