"""Checkpoints with one planted disease each, and the code that `diagnose` must find."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import EncoderDecoderConfig, EncoderDecoderModel

from hf_tying import TyingConfig, tie
from hf_tying.peft import export_to_lora

from ..tied_lora import tied_lora
from ..tiny import layer_pair, tiny_config, tiny_model, untied_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edit(folder: Path, file: str = "config.json", **changes) -> None:
    """Set fields of a JSON file; `None` takes one out."""
    path = folder / file
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def rewrite(folder: Path, file: str = "model.safetensors", **values) -> None:
    """Set tensors of a file; `None` leaves one out."""
    held = load_file(folder / file) | values
    save_file({n: t.contiguous() for n, t in held.items() if t is not None}, folder / file, {"format": "pt"})


def tensor(folder: Path, name: str = EMBEDDING) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[name]


def tied(folder: Path, arch: str = "llama", **changes) -> Path:
    """A stock model that its class ties."""
    tiny_model(arch, tie_word_embeddings=True, **changes).save_pretrained(folder)
    return folder


def untied(folder: Path, arch: str = "llama") -> Path:
    untied_model(arch).save_pretrained(folder)
    return folder


def held(folder: Path, scheme: str = "two_way", arch: str = "llama", **fields) -> Path:
    """A model tied by this package."""
    tie(untied_model(arch), TyingConfig(scheme=scheme, **fields), init_from="target").save_pretrained(folder)
    return folder


def noise(value: torch.Tensor) -> torch.Tensor:
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(3)).to(value.dtype)


# --- models ----------------------------------------------------------------------------------------------------------


def two_matrices(folder):
    tied(folder)
    rewrite(folder, **{HEAD: noise(tensor(folder))})


def one_row(folder):
    tied(folder)
    head = tensor(folder).clone()
    head[7] += 1
    rewrite(folder, **{HEAD: head})


def one_row_of_bart(folder):
    tied(folder, "bart")
    head = tensor(folder, "model.shared.weight").clone()
    head[7] += 1
    rewrite(folder, **{HEAD: head})


def entry_over_two_matrices(folder):
    held(folder, save_format="portable")
    rewrite(folder, **{HEAD: noise(tensor(folder))})


def layers_that_differ(folder):
    model = untied_model("llama")
    pair = layer_pair(model)
    tie(model, TyingConfig(groups={"layers": pair}), init_from="mean").save_pretrained(folder)
    rewrite(folder, **{pair[1]: noise(tensor(folder, pair[1]))})


def not_a_number(folder):
    tied(folder)
    head = tensor(folder).clone()
    head[0, 0] = float("nan")
    rewrite(folder, **{HEAD: head})


def head_missing(folder):
    tied(folder)
    edit(folder, tie_word_embeddings=False)


def embedding_missing(folder):
    untied(folder)
    rewrite(folder, **{EMBEDDING: None})


def head_missing_by_default(folder):
    """Llama's own default is false."""
    tied(folder)
    edit(folder, tie_word_embeddings=None)


def head_missing_of_gpt2(folder):
    tied(folder, "gpt2")
    edit(folder, tie_word_embeddings=False)


def no_name(folder):
    tied(folder)
    rewrite(folder, **{EMBEDDING: None})


def no_name_of_an_entry(folder):
    held(folder)
    rewrite(folder, **{EMBEDDING: None})


def entry_tied_flag_not(folder):
    held(folder)
    edit(folder, tie_word_embeddings=False)


def entry_none_flag_tied(folder):
    tie(untied_model("llama"), "none").save_pretrained(folder)
    edit(folder, tie_word_embeddings=True)


def entry_with_a_layer_that_is_not_there(folder):
    held(folder, save_format="portable")
    config = json.loads((folder / "config.json").read_text())
    config["tying"]["groups"]["embeddings"].append("model.layers.9.weight")
    edit(folder, tying=config["tying"])


def entry_of_no_scheme(folder):
    held(folder)
    edit(folder, tying={"version": 1, "scheme": "two_wey"})


def stale_vocabulary(folder):
    tied(folder)
    edit(folder, vocab_size=70)


def stale_vocabulary_of_a_part(folder):
    tied(folder, "llava")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, text_config=text | {"vocab_size": 70})


def written_twice(folder):
    tied(folder)
    rewrite(folder, **{HEAD: tensor(folder).clone()})


def equal_and_untied(folder):
    untied(folder)
    rewrite(folder, **{HEAD: tensor(folder).clone()})


def other_dtype(folder):
    tied(folder)
    rewrite(folder, **{EMBEDDING: tensor(folder).to(torch.bfloat16)})
    rewrite(folder, **{HEAD: tensor(folder).float()})


def order_of_t5(folder):
    """As T5 1.1 and madlad are published: their flag is false, and the class ties all the same."""
    tied(folder, "t5")
    edit(folder, tie_word_embeddings=False)
    rewrite(folder, **{HEAD: noise(tensor(folder, "shared.weight"))})


def order_without_a_root(folder):
    tied(folder, "bart")
    shared = tensor(folder, "model.shared.weight")
    sides = {f"model.{side}.embed_tokens.weight": noise(shared) ** i for i, side in ((1, "encoder"), (2, "decoder"))}
    rewrite(folder, **{"model.shared.weight": None}, **sides)


def encoder_decoder(folder):
    parts = [tiny_config("bert"), tiny_config("bert", is_decoder=True, add_cross_attention=True)]
    EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*parts)).save_pretrained(folder)
    edit(folder, tie_encoder_decoder=True)


def flag_of_the_text_part(folder):
    untied(folder, "llava")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, text_config=text | {"tie_word_embeddings": True})


def merged_model(folder):
    tied(folder)
    head = tensor(folder)
    generator = torch.Generator().manual_seed(1)
    update = torch.randn(64, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    rewrite(folder, **{HEAD: head + update})


def projection(folder):
    from hf_tying import use_projection

    use_projection(tie(untied_model("llama"), "two_way", init_from="target")).save_pretrained(folder)


def _with_code(folder, text):
    tied(folder)
    edit(folder, architectures=["HouseModel"], auto_map={"AutoModelForCausalLM": "modeling_house.HouseModel"})
    (folder / "modeling_house.py").write_text(text)


def code_that_needs_the_package(folder):
    _with_code(folder, "from hf_tying import TiedModelMixin\n")


def code_that_needs_a_submodule(folder):
    _with_code(folder, "if True:\n    import hf_tying.losses  # noqa\n")


def code_that_does_not_parse(folder):
    _with_code(folder, "from .hf_tying_modeling import # keeps the ties\n")


def code_whose_sibling_is_missing(folder):
    _with_code(folder, "from .configuration_house import HouseConfig\n")


def list_of_keys(folder):
    _with_code(folder, "class HouseModel:\n    _tied_weights_keys = ['lm_head.weight']\n")


def pickle(folder):
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def dead_tensor(folder):
    tied(folder)
    rewrite(folder, **{"old_head.weight": torch.zeros(64, 16)})


def dead_tensor_in_a_layer(folder):
    tied(folder)
    rewrite(folder, **{"model.layers.0.old.weight": torch.zeros(4)})


def too_many_layers(folder):
    tied(folder)
    edit(folder, num_hidden_layers=3)


def layers_without_end(folder):
    tied(folder)
    edit(folder, num_hidden_layers=10**9)


def wrong_width(folder):
    tied(folder)
    edit(folder, intermediate_size=48)


def gguf_header(tensors: dict[str, list[int]], architecture: str = "llama", data: bytes | None = None) -> bytes:
    """A GGUF file of float32 tensors, shapes with the rows last."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1)
    head += text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    offset = 0
    for name, shape in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        head += struct.pack("<IQ", 0, offset)
        offset += 4 * shape[0] * shape[1]
    return head + bytes(-len(head) % 32) + (bytes(offset) if data is None else data)


def gguf_with_both(folder):
    folder.mkdir()
    (folder / "model.gguf").write_bytes(gguf_header({"token_embd.weight": [16, 64], "output.weight": [16, 64]}))


# --- adapters --------------------------------------------------------------------------------------------------------


def _adapter(folder, **settings):
    base = tied(folder.parent / f"{folder.name}-base")
    model = tiny_model("llama", tie_word_embeddings=True)
    model.name_or_path = str(base)
    adapted = get_peft_model(model, LoraConfig(r=2, **settings))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)


def lora_on_the_head(folder):
    _adapter(folder, target_modules=["q_proj", "lm_head"])


def lora_on_the_embedding(folder):
    _adapter(folder, target_modules=["q_proj", "embed_tokens"])


def whole_head_trained(folder):
    _adapter(folder, target_modules=["q_proj"], modules_to_save=["lm_head"])


def base_is_a_path(folder):
    _adapter(folder, target_modules=["q_proj"])


def tied_form_alone(folder):
    tied_lora(tiny_model("llama")).save_pretrained(folder)


def forms_differ(folder):
    tied_lora(tiny_model("llama")).save_pretrained(folder / "tied_lora")
    export_to_lora(folder / "tied_lora", folder)
    file = "adapter_model.safetensors"
    name = next(n for n in load_file(folder / file) if "lora_B" in n)
    rewrite(folder, file, **{name: load_file(folder / file)[name] + 1})


def bart_tied_once(folder):
    held(folder, "two_way", "bart", save_format="dedup")


def source_and_target_once(folder):
    entry = TyingConfig("source_target", save_format="dedup")
    tie(untied_model("bart"), entry, init_from="source").save_pretrained(folder)


#: Each disease: (the code, what plants it in a new folder).
PLANTED: list[tuple[str, Callable[[Path], None]]] = [
    *(("T001", plant) for plant in (two_matrices, one_row, one_row_of_bart, entry_over_two_matrices)),
    *(("T001", plant) for plant in (layers_that_differ, not_a_number)),
    *(("T002", plant) for plant in (head_missing, embedding_missing, head_missing_by_default, head_missing_of_gpt2)),
    *(("T003", plant) for plant in (no_name, no_name_of_an_entry)),
    *(("T004", plant) for plant in (entry_tied_flag_not, entry_none_flag_tied)),
    *(("T004", plant) for plant in (entry_with_a_layer_that_is_not_there, entry_of_no_scheme)),
    *(("T005", plant) for plant in (stale_vocabulary, stale_vocabulary_of_a_part)),
    ("T006", written_twice),
    ("T006", gguf_with_both),
    ("T007", equal_and_untied),
    ("T008", other_dtype),
    *(("T009", plant) for plant in (order_of_t5, order_without_a_root)),
    ("T010", encoder_decoder),
    ("T011", flag_of_the_text_part),
    *(("T012", plant) for plant in (lora_on_the_head, lora_on_the_embedding, whole_head_trained)),
    ("T013", merged_model),
    ("T014", projection),
    ("T015", tied_form_alone),
    ("T016", forms_differ),
    ("T017", base_is_a_path),
    *(("T018", plant) for plant in (code_that_needs_the_package, code_that_needs_a_submodule)),
    *(("T018", plant) for plant in (code_that_does_not_parse, code_whose_sibling_is_missing)),
    ("T019", list_of_keys),
    ("T020", pickle),
    *(("T021", plant) for plant in (dead_tensor, dead_tensor_in_a_layer)),
    *(("T022", plant) for plant in (too_many_layers, layers_without_end, wrong_width)),
    *(("T023", plant) for plant in (bart_tied_once, source_and_target_once)),
]


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to
