"""`parallel_plan`: counts that a communication hook repeats, copies and their ranks, refusals, and its command."""

import json
import re

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from hf_tying import TyingError, tie
from hf_tying.cli.app import app
from hf_tying.parallel import parallel_plan

from ..tiny import layer_pair, tiny_model, untied_model

MATRIX = 64 * 16 * 4  # bytes


def tied(arch: str = "llama", scheme: str = "two_way"):
    return tie(untied_model(arch), scheme, init_from="output")


def test_ddp_sends_a_tied_matrix_once():
    plan = parallel_plan(tied(), {"dp": 8})
    [group, rest] = plan.groups
    [collective] = group.collectives
    assert (collective.kind, collective.axis, collective.ranks) == ("all_reduce", "dp", 8)
    assert (collective.payload, collective.sent) == (MATRIX, 2 * 7 * MATRIX // 8)
    assert (group.copies, group.shards, group.ranks) == (8, 1, tuple(range(8)))
    assert plan.sent == group.sent + rest.sent == plan.sent_untied - group.sent


def test_fsdp_gathers_what_it_keeps_once_and_the_layers_twice():
    plan = parallel_plan(tied(), {"fsdp": 4})
    [group, rest] = plan.groups
    assert [c.kind for c in group.collectives] == ["all_gather", "reduce_scatter"]
    assert (group.copies, group.shards, group.unit) == (1, 4, "root")
    assert [c.what for c in rest.collectives] == ["weights, forward", "weights, backward", "gradient"]


def test_an_untied_three_way_model_would_send_two_matrices_more_and_no_carrier():
    plan = parallel_plan(tied("bart", "three_way"), {"dp": 2})
    assert plan.sent_untied - plan.sent == 2 * MATRIX  # source, target, output; `shared` is no matrix of its own


@pytest.mark.parametrize("mesh", [{"dp": 4}, {"fsdp": 4}, {"dp": 2, "fsdp": 2}])
@pytest.mark.parametrize(("arch", "scheme"), [("llama", "two_way"), ("bart", "three_way"), ("llama", "layers")])
def test_what_an_untied_model_would_send_is_what_it_sends(arch, scheme, mesh):
    model = untied_model(arch)
    untied = parallel_plan(tie(model, "none"), mesh)
    groups = {"layers": layer_pair(model)} if scheme == "layers" else scheme
    assert parallel_plan(tie(model, groups, init_from="mean"), mesh).sent_untied == untied.sent


def test_stages_and_parts():
    plan = parallel_plan(tied(), {"pp": 2, "dp": 2, "tp": 2})
    group = plan.groups[0]
    assert group.stages == (0, 1) and group.copies == 4 and group.shards == 2
    embedding = tied().tp_plan.get("model.embed_tokens")  # some versions split the softmax alone
    assert embedding in (None, "embedding_rowwise")
    styles = {"model.embed_tokens.weight": embedding, "lm_head.weight": "colwise_gather_output"}
    assert group.styles == {name: style for name, style in styles.items() if style}
    assert [(c.axis, c.payload) for c in group.collectives] == [("dp", MATRIX // 2), ("pp", MATRIX // 2)]
    assert re.search(r"'embeddings' has copies on stages \[0, 1\]", plan.notes[0])
    layers = parallel_plan(tie(untied_model("llama"), layer_pair(untied_model("llama")), init_from="mean"), {"pp": 2})
    assert layers.groups[0].stages == (0, 1)


def test_a_frozen_matrix_has_no_gradient_to_send():
    model = tied()
    model.lm_head.weight.requires_grad_(False)
    assert parallel_plan(model, {"dp": 2}).groups[0].collectives == ()


def test_figures_of_a_large_model_from_its_config_alone(tmp_path):
    LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    plan = parallel_plan(str(tmp_path), {"dp": 64}, reduce_dtype=torch.bfloat16)
    assert sum(group.parameters for group in plan.groups) == 1_235_814_400
    assert plan.sent / 2**30 == pytest.approx(4.53, abs=0.005)
    assert plan.sent_untied / 2**30 == pytest.approx(5.50, abs=0.005)
    settings = tmp_path / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"dtype": "bfloat16"}))
    assert parallel_plan(str(tmp_path), {"dp": 64}).sent == plan.sent  # as from_pretrained makes it


@pytest.mark.parametrize(
    ("arch", "mesh", "why"),
    [
        ("llama", {"ddp": 2}, "unknown axis 'ddp'.*'dp'"),
        ("llama", {"dp": 0}, "from 1 for 'dp', found 0"),
        ("llama", {"dp": True}, "found True"),
        ("llama", "dp=2", "mesh='dp=2': expected sizes by axis"),
        ("llama", {2: 2}, "unknown axis 2"),
        ("llama", {"dp": 2**20, "tp": 2}, "at most 1,048,576 processes together"),
        ("llama", {"pp": 3}, "pp=3 stages, and the model has 2 layers"),
        ("bart", {"pp": 2}, "encoder and a decoder"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(arch, mesh, why):
    with pytest.raises(TyingError, match=why):
        parallel_plan(tiny_model(arch), mesh)


def test_the_command_prints_a_table_json_and_a_picture(tmp_path):
    tied().save_pretrained(tmp_path / "model")
    run = lambda *more: CliRunner().invoke(app, ["plan", str(tmp_path / "model"), "--mesh", *more])  # noqa: E731
    assert "embeddings" in run("dp=8,tp=2").stdout
    found = json.loads(run("dp=8,tp=2", "--json").stdout)
    assert (found["schema"], found["command"], found["world_size"]) == (1, "plan", 16)
    assert found["groups"][0]["names"] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert run("dp=2,fsdp=2", "--plot", str(tmp_path / "plan.svg")).exit_code == 0
    assert "MiB that a rank sends" in (tmp_path / "plan.svg").read_text() or (tmp_path / "plan.svg").stat().st_size
    for wrong in ("dp", "dp=x", "dp=2,dp=2", "dp=-1", "dp=0", "nodes=2", f"dp={10**20}"):
        assert run(wrong).exit_code == 2
    for path in (tmp_path / "no" / "plan.png", tmp_path / "plan.xyz"):
        assert run("dp=2", "--plot", str(path)).exit_code == 2
