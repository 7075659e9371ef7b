"""Shared layers: every pattern on many architectures, beside the plain model that it is unrolled to."""

import copy
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RwkvConfig,
    RwkvForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from hf_tying import (
    TyingConfig,
    TyingError,
    assert_tied,
    fold,
    gap,
    share_layers,
    tie,
    tying_report,
    unroll,
    untie,
    use_projection,
)
from hf_tying.depth.patterns import PATTERNS, order_of
from hf_tying.depth.stacks import chosen_stacks
from hf_tying.training import shared_layer_parameters
from tests.tiny import Sentences, logits, tiny_inputs, tiny_model, untied_model

LENGTHS = {"gpt2": {"n_layer": 4}, "t5": {"num_layers": 4}, "bart": {"encoder_layers": 4, "decoder_layers": 4}}
ARCHITECTURES = ["llama", "qwen3", "gpt2", "opt", "bert", "modernbert", "gemma3_text", "mamba", "t5", "bart"]
UNIQUE = {"sandwich": 3, "middle_cycle": 3, "all": 1}


def vision():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
        )
    )


def speech():
    return WhisperForConditionalGeneration(
        WhisperConfig(
            d_model=16, encoder_layers=4, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50, max_source_positions=10, num_mel_bins=8,
            max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip


def plain(name="llama", **changes):
    torch.manual_seed(0)
    if name in ("vision", "speech"):
        return {"vision": vision, "speech": speech}[name]().eval()
    return tiny_model(name, **LENGTHS.get(name, {"num_hidden_layers": 4}), **changes)


def output(model):
    if isinstance(model, ViTForImageClassification):
        image = torch.randn(1, 3, 8, 8, generator=torch.manual_seed(1))
        return model(image).logits.detach()
    if isinstance(model, WhisperForConditionalGeneration):
        sound = torch.randn(1, 8, 20, generator=torch.manual_seed(1))
        return model(sound, decoder_input_ids=torch.tensor([[1, 3, 4]])).logits.detach()
    return logits(model)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


#: Each pattern on a decoder and on two stacks, two of them on each other architecture; all with ZOO=1.
CASES = [
    (name, pattern)
    for name in [*ARCHITECTURES, "vision", "speech"]
    for pattern in PATTERNS
    if os.environ.get("ZOO") or name in ("llama", "bart") or pattern in ("cycle", "sandwich")
]


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_every_pattern_is_shared_saved_unrolled_and_folded(name, pattern, tmp_path):
    model = share_layers(plain(name), pattern, UNIQUE.get(pattern, 2), init="average")
    assert_tied(model)
    before, few = output(model), parameters(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert_tied(loaded)
    assert torch.equal(output(loaded), before) and parameters(loaded) == few
    assert loaded.config.tying == model.config.tying and loaded.config.tying["version"] == 2
    assert unroll(model) is model
    assert_tied(model)
    assert torch.equal(output(model), before)
    assert parameters(model) == parameters(plain(name))
    fold(model)
    assert_tied(model)
    assert torch.equal(output(model), before) and parameters(model) == few


def test_the_orders_are_those_of_the_papers():
    orders = {pattern: order_of(pattern, 6, {"sandwich": 3, "all": 1}.get(pattern, 3)) for pattern in PATTERNS}
    assert orders == {
        "sequence": [0, 0, 1, 1, 2, 2], "cycle": [0, 1, 2, 0, 1, 2], "cycle_rev": [0, 1, 2, 2, 1, 0],
        "sandwich": [0, 1, 1, 1, 1, 2], "middle_cycle": [0, 1, 1, 1, 1, 2], "immediate": [0, 0, 1, 1, 2, 2],
        "all": [0, 0, 0, 0, 0, 0],
    }  # fmt: skip
    assert order_of("middle_cycle", 8, 4) == [0, 1, 2, 1, 2, 1, 2, 3]
    # As in the authors' code: every block once, before the way back.
    assert order_of("cycle_rev", 6, 4) == [0, 1, 2, 3, 3, 2] and order_of("cycle_rev", 7, 3) == [0, 1, 2, 0, 2, 1, 0]


def test_the_entry_is_short_and_stock_reads_the_file(tmp_path):
    model = share_layers(plain(), "cycle", 2)
    entry = model.config.tying
    assert entry["depth"] == [{"path": "model.layers", "order": [0, 1, 0, 1]}] and not entry["groups"]
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tying"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(stock), logits(model)) and parameters(stock) > parameters(model)


def test_dedup_has_each_block_once_and_stock_refuses_it(tmp_path):
    model = share_layers(plain(), "cycle", 2, save_format="dedup")
    model.save_pretrained(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    assert sum(tensor.numel() for tensor in tensors.values()) == parameters(model)
    assert not any(name.startswith(("model.layers.2.", "model.layers.3.")) for name in tensors)
    for cls in (AutoModelForCausalLM, AutoModel):
        loaded = cls.from_pretrained(tmp_path)
        assert_tied(loaded)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tying"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_base_model_of_the_file_is_shared_too(tmp_path):
    share_layers(plain(), "sequence", 2).save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert_tied(base)
    assert base.layers[0].mlp.up_proj.weight is base.layers[1].mlp.up_proj.weight


class TestInitialValues:
    NAME = "self_attn.q_proj.weight"

    def values(self, model):
        return [layer.self_attn.q_proj.weight.detach().clone() for layer in model.model.layers]

    @pytest.mark.parametrize("init", ["first", "average", "stepwise"])
    def test_are_those_of_the_layers(self, init):
        model = plain()
        old = self.values(model)
        new = self.values(share_layers(model, "cycle", 2, init=init))
        expected = {
            "first": [old[0], old[1]],
            "average": [(old[0] + old[2]) / 2, (old[1] + old[3]) / 2],
            "stepwise": [old[0], old[3]],
        }[init]
        for found, wanted in zip(new, expected * 2, strict=True):
            torch.testing.assert_close(found, wanted)

    def test_a_higher_rank_is_nearer_and_the_full_one_is_the_model(self):
        stock, errors = plain(), []
        for rank in (1, 4, 16):
            model = share_layers(
                copy.deepcopy(stock), "cycle", 2, init="svd", relax={"rank": rank}, private=["*norm*"]
            )
            pairs = zip(self.values(stock)[2:], model.model.layers[2:], strict=True)
            errors.append(max((old - layer.self_attn.q_proj.weight).norm().item() for old, layer in pairs))
        assert errors == sorted(errors, reverse=True) and errors[1] < errors[0]
        torch.testing.assert_close(logits(model), logits(stock), atol=1e-4, rtol=0)

    def test_a_relaxed_model_is_saved_unrolled_and_folded(self, tmp_path):
        model = share_layers(plain(), "cycle", 2, init="svd", relax={"rank": 3}, private=["*norm*"])
        before, distance = logits(model), gap(model)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded), before) and gap(loaded) == distance
        assert loaded.config.tying["depth"][0]["relax"] == {"kind": "lora", "rank": 3}
        unroll(model)
        torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=0)
        fold(model)
        assert_tied(model)
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


class TestGrowing:
    ORDER = [0, 1, 2, 1, 2, 3]

    def test_starts_as_the_model_that_it_was(self, tmp_path):
        stock = plain()
        model = share_layers(copy.deepcopy(stock), order=self.ORDER, grow=True)
        assert torch.equal(logits(model), logits(stock))
        assert model.config.num_hidden_layers == 6 and model.config.tying["depth"][0]["damped"] == [3, 4]
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))
        for i in (3, 4):
            model.model.layers[i].visit_factor.data.fill_(0.5)
        model.save_pretrained(tmp_path)
        assert not (tmp_path / "model.safetensors").exists()  # stock would read another function
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_tied(loaded)
        assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(model), logits(stock))
        with pytest.raises(TyingError, match="visit_factor"):
            unroll(model)

    @pytest.mark.parametrize(
        ("name", "stack", "sizes"),
        [
            *(("t5", side, {"num_layers": 3}) for side in ("encoder", "decoder")),
            *(("bart", side, {"encoder_layers": 3, "decoder_layers": 3}) for side in ("encoder", "decoder")),
            ("llava", "model.language_model.layers", {}),
            *((name, None, {"num_hidden_layers": 3}) for name in ("bert", "modernbert", "mamba", "mixtral")),
            ("gpt2", None, {"n_layer": 3}),
        ],
        ids=str,
    )
    def test_one_stack_alone_grows_and_is_read_again(self, name, stack, sizes, tmp_path):
        """Of two stacks with the same number of layers, and with a second model from the same config."""
        stock = tiny_model(name, **sizes)
        model = copy.deepcopy(stock)
        other = type(stock)(model.config)
        size = len(next(iter(chosen_stacks(model, stack).values())))
        share_layers(model, order=[*range(size), size - 1], grow=True, stack=stack)
        assert torch.equal(logits(model), logits(stock))
        assert other.config.to_dict() == stock.config.to_dict()
        model.save_pretrained(tmp_path)
        loaded = type(stock).from_pretrained(tmp_path, ignore_mismatched_sizes=False)
        assert_tied(loaded)
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.state_dict().keys() == model.state_dict().keys()

    def test_one_stack_grows_after_the_other_and_beside_a_projection(self, tmp_path):
        model = use_projection(tiny_model("bart", encoder_layers=2, decoder_layers=2))
        before = logits(model)
        share_layers(model, order=[0, 1, 1], grow=True, stack="encoder")
        share_layers(model, order=[0, 0, 1, 1], grow=True, stack="decoder")
        assert (model.config.encoder_layers, model.config.decoder_layers) == (3, 4)
        assert torch.equal(logits(model), before)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), before)

    @pytest.mark.parametrize(
        ("name", "stack", "sizes"), [("t5", "encoder", {"num_layers": 3}), ("modernbert", None, {})]
    )
    def test_a_layer_that_no_config_makes_is_refused(self, name, stack, sizes):
        """The first layer has a position bias, or no norm, and a second visit of it would not be read from a file."""
        model = tiny_model(name, **sizes)
        before, keys = model.config.to_dict(), model.state_dict().keys()
        size = len(next(iter(chosen_stacks(model, stack).values())))
        with pytest.raises(TyingError, match="Cannot grow .*Leave out the layer"):
            share_layers(model, order=[0, *range(size)], grow=True, stack=stack)
        assert model.config.to_dict() == before and model.state_dict().keys() == keys

    def test_a_stage_that_the_config_would_make_wider_is_refused(self):
        model = SwinForImageClassification(
            SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
        )
        with pytest.raises(TyingError, match="Cannot grow 'swin.encoder.layers'"):
            share_layers(model, order=[0, 0, 1], grow=True)
        assert model.config.depths == [1, 1]

    def test_each_visit_has_its_place_in_the_cache_under_any_name(self):
        config = GPTNeoConfig(
            vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
            intermediate_size=32, max_position_embeddings=64,
        )  # fmt: skip
        model = share_layers(GPTNeoForCausalLM(config), order=[0, 1, 1], grow=True, stack="transformer.h")
        assert [layer.attn.attention.layer_id for layer in model.transformer.h] == [0, 1, 2]

    def test_layers_of_other_forms_start_as_the_identity(self):
        """OpenAI's GPT has layers that return lists."""
        model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16))
        ids = torch.randint(64, (2, 5))
        before = model.eval()(ids).logits
        assert torch.equal(share_layers(model, order=[0, 1, 1], grow=True).eval()(ids).logits, before)

    def test_layers_of_two_states_are_refused(self):
        """XLNet's second stream would not start as the identity."""
        model = XLNetLMHeadModel(XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=32))
        for further in ({"order": [0, 1, 1], "grow": True}, {"pattern": "all", "residual_factor": 0.5}):
            with pytest.raises(TyingError, match="two states, output_h and output_g"):
                share_layers(model, **further)
        assert len(model.transformer.layer) == 2

    def test_the_factor_learns(self):
        model = share_layers(plain(), order=self.ORDER, grow=True)
        model(**tiny_inputs(model)).loss.backward()
        assert model.model.layers[3].visit_factor.grad.abs() > 0

    def test_lists_of_the_config_follow(self):
        model = plain("gemma3_text", layer_types=["sliding_attention", "full_attention"] * 2)
        share_layers(model, order=[0, 1, 2, 3, 2, 3], grow=True)
        assert model.config.layer_types == ["sliding_attention", "full_attention"] * 3

    def test_generation_with_a_cache_is_that_without(self):
        model = share_layers(plain(), order=self.ORDER, grow=True)
        for i in (3, 4):
            model.model.layers[i].visit_factor.data.fill_(1.0)
        ids = torch.tensor([[3, 4, 5]])
        runs = [model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)]
        assert torch.equal(*runs)


def test_matrices_that_a_model_divides_by_their_layer_are_not_shared():
    """RWKV does so in evaluation, in place: two visits would divide one matrix twice."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 4}
    with pytest.raises(TyingError, match="rescale_every=0"):
        share_layers(RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=2)), pattern="sequence", unique=2)
    model = share_layers(RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=0)), pattern="sequence", unique=2)
    ids = torch.randint(64, (2, 5))
    assert torch.equal(model.eval()(ids).logits, unroll(copy.deepcopy(model))(ids).logits)


def test_a_private_part_may_be_in_one_stack_alone():
    model = share_layers(tiny_model("bart", **LENGTHS["bart"]), pattern="all", private=["encoder_attn*"])
    layers = model.model.decoder.layers
    assert layers[0].encoder_attn.k_proj.weight is not layers[1].encoder_attn.k_proj.weight
    assert layers[0].fc1.weight is layers[1].fc1.weight
    assert "private" not in TyingConfig.in_config(model.config).depth[0]


def test_the_gradient_of_a_block_is_the_sum_over_its_visits():
    model = share_layers(plain(), "cycle", 2)
    twin = unroll(copy.deepcopy(model))
    for each in (model, twin):
        each(**tiny_inputs(each)).loss.backward()
    for i, layer in enumerate(model.model.layers[:2]):
        expected = sum(twin.model.layers[j].mlp.up_proj.weight.grad for j in (i, i + 2))
        torch.testing.assert_close(layer.mlp.up_proj.weight.grad, expected)


@pytest.mark.parametrize(
    ("factor", "expected"), [(0.25, [0.25] * 4), ("looped", [1 / (n * 2**0.5) for n in (3, 1, 3, 3)])]
)
def test_a_residual_factor_is_that_of_what_each_layer_adds(factor, expected, tmp_path):
    model = share_layers(plain(), order=[0, 1, 0, 0], residual_factor=factor)
    assert [layer.visit_factor.item() for layer in model.model.layers] == pytest.approx(expected)
    twin = share_layers(plain(), order=[0, 1, 0, 0])
    for layer, share in zip(twin.model.layers, expected, strict=True):
        layer.register_forward_hook(lambda _, args, out, share=share: args[0] + share * (out - args[0]))
    torch.testing.assert_close(logits(model), logits(twin))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_the_learning_rate_of_a_block_is_that_of_its_visits():
    model = share_layers(plain(), order=[0, 1, 0, 0], private=["*norm*"])
    groups = shared_layer_parameters(model, 0.6, power=1.0, weight_decay=0.1)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rate) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    layers = model.model.layers
    found = [rate[id(layer.mlp.up_proj.weight)] for layer in layers]
    assert found == pytest.approx([0.2, 0.6, 0.2, 0.2])
    assert rate[id(layers[0].input_layernorm.weight)] == rate[id(model.lm_head.weight)] == 0.6
    assert {group["lr"] for group in shared_layer_parameters(unroll(model), 0.6)} == {0.6}
    with pytest.raises(TyingError, match="a power from 0"):
        shared_layer_parameters(model, 0.6, power=-1)


def test_an_albert_is_unshared_and_trains_with_layers_of_its_own(tmp_path):
    model = plain("albert")
    before, few = logits(model), parameters(model)
    unroll(model)
    assert torch.equal(logits(model), before) and parameters(model) > 2 * few
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), before)
    loaded.train()(**tiny_inputs(loaded)).loss.backward()
    first, second = (group.albert_layers[0].ffn.weight.grad for group in loaded.albert.encoder.albert_layer_groups[:2])
    assert not torch.equal(first, second)
    assert_tied(share_layers(loaded, "cycle", 2))


class TestALife:
    """The flows that break a tie, for shared layers."""

    def model(self):
        return share_layers(plain(), "cycle", 2)

    def test_copies_pickles_and_casts(self):
        model = self.model()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).half().float()):
            assert_tied(other)
            assert parameters(other) == parameters(model)

    @pytest.mark.parametrize("assign", [False, True])
    def test_state_dicts(self, assign):
        model, other = self.model(), share_layers(plain(), "cycle", 2, init="stepwise")
        other.load_state_dict(model.state_dict(), assign=assign)
        assert_tied(other)
        assert torch.equal(logits(other), logits(model))

    def test_a_resize_and_tied_embeddings(self):
        model = tie(self.model(), "two_way", init_from="target")
        model.resize_token_embeddings(70)
        assert_tied(model)
        assert model.config.tying["depth"] and model.config.tying["scheme"] == "two_way"

    def test_a_part_that_is_untied_is_recorded_by_its_names(self, tmp_path):
        model = untie(self.model(), ["model.layers.2.mlp.up_proj.weight"])
        assert_tied(model)
        assert "depth" not in model.config.tying and model.config.tying["groups"]
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_tied(loaded)
        assert parameters(loaded) == parameters(model)

    def test_a_broken_tie_is_told(self):
        model = self.model()
        model.model.layers[2].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(32, 16))
        with pytest.raises(TyingError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
            assert_tied(model)

    @pytest.mark.parametrize("save_format", ["portable", "dedup"])
    def test_a_trainer_resumes(self, save_format, tmp_path):
        def trainer():
            torch.manual_seed(0)
            arguments = TrainingArguments(
                tmp_path, max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant",
            )  # fmt: skip
            return Trainer(
                share_layers(plain(), "cycle", 2, save_format=save_format), arguments, train_dataset=Sentences()
            )

        whole, resumed = trainer(), trainer()
        whole.train()
        resumed.train(resume_from_checkpoint=os.fspath(tmp_path / "checkpoint-2"))
        assert_tied(resumed.model)
        assert torch.equal(logits(resumed.model), logits(whole.model))

    def test_gradient_checkpointing_computes_the_same_gradient(self):
        models = [self.model().train() for _ in range(2)]
        models[1].gradient_checkpointing_enable({"use_reentrant": False})
        for model in models:
            model(**tiny_inputs(model)).loss.backward()
        grads = [model.model.layers[0].mlp.up_proj.weight.grad for model in models]
        torch.testing.assert_close(*grads)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, "either a pattern"), ({"pattern": "cycel", "unique": 2}, "nearest names are 'cycle'"),
            ({"pattern": "cycle"}, "from 1 to 4"), ({"pattern": "cycle", "unique": 5}, "from 1 to 4"),
            ({"pattern": "sandwich", "unique": 2}, "unique=3"), ({"order": [0, 1]}, "has 2 layers, and '.*' has 4"),
            ({"order": [0, 1, 2, 3, 2]}, "grow=True"), ({"order": [0, 1, -1, 0]}, "numbers from 0"),
            ({"order": [0, 1, 1, 0], "grow": True}, "at least once"), ({"pattern": "all", "grow": True}, "needs"),
            ({"pattern": "all", "private": ["*nrom*"]}, "matches nothing"),
            ({"pattern": "all", "private": [3]}, "matches nothing"),
            ({"pattern": ["cycle"], "unique": 2}, "Unknown pattern"),
            ({"pattern": "all", "init": "mean"}, "expected one of first"),
            ({"pattern": "all", "init": "svd"}, "relax="),
            ({"pattern": "all", "init": "svd", "relax": {"kind": "scale"}}, "into a low rank"),
            ({"pattern": "all", "relax": {"rank": 0}}, "whole number"),
            *(({"pattern": "all", "residual_factor": factor}, "above 0, or 'looped'") for factor in (0, "loop", True)),
            ({"order": [0, 1, 2, 3, 3], "grow": True, "residual_factor": 0.5}, "no residual_factor"),
            ({"pattern": "all", "stack": "encoder"}, "no stack of layers 'encoder'"),
        ],
        ids=str,
    )  # fmt: skip
    def test_settings(self, settings, message):
        model = plain()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(TyingError, match=message):
            share_layers(model, **settings)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert getattr(model.config, "tying", None) is None and model.config.num_hidden_layers == 4

    def test_layers_of_different_kinds_are_named_with_what_fits(self):
        model = plain()
        wide = untied_model("llama").model.layers[0]
        wide.mlp.up_proj = torch.nn.Linear(16, 64, bias=False)
        model.model.layers[0] = wide
        with pytest.raises(TyingError, match="Layers 0 and 2 .* one block.*Layers like layer 0: .0.*sandwich"):
            share_layers(model, "cycle", 2)
        share_layers(model, "sandwich")

    def test_shared_twice_and_the_way_out(self):
        model = share_layers(plain(), "cycle", 2)
        with pytest.raises(TyingError, match="unroll"):
            share_layers(model, "sequence", 2)
        assert_tied(share_layers(unroll(model), "sequence", 2))

    def test_nothing_to_unroll_or_to_fold(self):
        for change in (unroll, fold):
            with pytest.raises(TyingError, match="share_layers"):
                change(plain())

    def test_visits_that_were_trained_apart_are_not_folded(self):
        model = unroll(share_layers(plain(), "cycle", 2))
        model.model.layers[2].mlp.up_proj.weight.data.add_(0.1)
        with pytest.raises(TyingError, match="differ by more than a shared block can"):
            fold(model)
        assert_tied(share_layers(model, "cycle", 2, init="average"))

    @pytest.mark.parametrize(
        "depth",
        [3, [3], [{}], [{"path": "a"}], [{"path": "a", "order": [0]}], [{"path": "a", "order": [0, "1"]}],
         [{"path": "a", "order": [0] * 20_000}], [{"path": "a", "order": [0, 0], "other": 1}],
         [{"path": "a", "order": [0, 0]}] * 2, [{"path": "a", "order": [0, 0], "relax": {"kind": "x"}}],
         [{"path": "a", "order": [0, 0], "private": [1]}], [{"path": "a", "order": [0, 0], "damped": ["x"]}]],
        ids=lambda value: str(value)[:40],
    )  # fmt: skip
    def test_entries(self, depth):
        with pytest.raises(TyingError):
            TyingConfig(depth=depth)

    def test_a_file_with_another_number_of_layers(self, tmp_path):
        share_layers(plain(), "cycle", 2).save_pretrained(tmp_path)
        with pytest.raises(TyingError, match="4 layers of '.*layers', and the model has 3"):
            AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=3)


@pytest.mark.parametrize("save_format", ["portable", "dedup"])
@pytest.mark.parametrize("relax", [None, {"rank": 2}], ids=["exact", "relaxed"])
def test_the_report_on_the_file_is_that_on_the_model(save_format, relax, tmp_path):
    model = share_layers(plain(), "cycle", 2, init="svd" if relax else "first", relax=relax, save_format=save_format)
    model.save_pretrained(tmp_path)
    found, live = tying_report(tmp_path), tying_report(model)
    assert found.ok and not found.findings
    assert {tuple(group.names) for group in found.groups} == {tuple(group.names) for group in live.groups}
    assert found.parameters == live.parameters == parameters(model)
