"""Everything that is pushed, by the real client: `run_script("hub_push.py", variables=hub.variables)`.

Each case returns what its test looks at. `logits` are those of the live model on `tiny_inputs`, for those who load it.
"""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_tying import TyingConfig, TyingError, tie, use_projection
from hf_tying.data import train_byte_level_bpe
from hf_tying.peft import TiedLoraConfig
from tests.native_adapters import NATIVE_REFUSAL
from tests.processes import run_cases
from tests.tied_lora import outputs, shake, tied_lora
from tests.tiny import Sentences, layer_pair, logits, tiny_model, untied_model

BASE = "tester/base"
SETTINGS = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "task_type": "CAUSAL_LM"}
WORK = Path(tempfile.mkdtemp())


def base():
    """The base model of all adapters, which is on the Hub: the first case pushes it."""
    return AutoModelForCausalLM.from_pretrained(BASE)


def values(tensor: torch.Tensor) -> list[float]:
    return tensor.flatten().tolist()


def upload(card: ModelCard, repo_id: str) -> None:
    """Not by `card.push_to_hub`, which asks huggingface.co itself about the metadata in some versions."""
    HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=repo_id)


@contextmanager
def refused():
    """Collect the message of the refusal inside."""
    message = {}
    try:
        yield message
    except TyingError as error:
        message["text"] = str(error)
    assert message, "it was not refused"


def push_base():
    model = tiny_model("llama")
    model.push_to_hub(BASE)
    return {"logits": values(logits(model))}


def push_tied():
    model = tie(untied_model("llama"), "two_way", init_from="target")
    model.push_to_hub("tied")
    return {"logits": values(logits(model))}


def push_group():
    model = tiny_model("qwen3")
    model = tie(model, TyingConfig(groups={"mlp": layer_pair(model)}), init_from="mean")
    model.save_pretrained(WORK / "group", push_to_hub=True, repo_id="group")
    return {"logits": values(logits(model))}


def push_projection():
    model = shake_projection(use_projection(tiny_model("gpt2")))
    model.push_to_hub("projection")
    return {"logits": values(logits(model))}


def shake_projection(model):
    with torch.no_grad():
        weight = model.get_output_embeddings().projection.weight
        weight.copy_(torch.flip(weight, [0]))  # the identity, with its rows in the other order
    return model


def push_twice():
    """A card with a line by hand, then another push of the same model, then one without ties."""
    model = tie(untied_model("llama"), "two_way", init_from="target")
    model.push_to_hub("twice")
    card = ModelCard.load("tester/twice")
    card.text = card.text.replace("## Load it", "By hand, inside.\n\n## Load it") + "\n## My notes\n\nBy hand.\n"
    card.data.license = "mit"
    upload(card, "tester/twice")
    model.push_to_hub("twice")
    again = HfApi().model_info("tester/twice").sha
    model.push_to_hub("twice")
    return {"same": HfApi().model_info("tester/twice").sha == again}


def push_peft():
    model = tied_lora(base(), **SETTINGS)
    model.push_to_hub("peft")
    model.push_to_hub("peft", revision="dev")
    card = ModelCard.load("tester/peft")
    card.text += "\n## Of main\n\nBy hand.\n"
    upload(card, "tester/peft")
    model.push_to_hub("peft", revision="dev")
    return {"logits": values(outputs(model))}


def push_two_adapters():
    model = tied_lora(base(), **SETTINGS)
    model.add_adapter("second", TiedLoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    shake(model, 2, "second")
    model.push_to_hub("two")
    model.set_adapter("second")
    return {"logits": values(outputs(model))}


def push_native():
    if NATIVE_REFUSAL:
        return {"refused": NATIVE_REFUSAL}
    model = base()
    model.add_adapter(TiedLoraConfig(**SETTINGS))
    shake(model)
    model.eval().push_to_hub("native")
    return {"logits": values(outputs(model))}


def arguments(name: str, **more) -> TrainingArguments:
    settings = {
        "push_to_hub": True, "hub_model_id": name, "max_steps": 2, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
    }  # fmt: skip
    return TrainingArguments(WORK / name, **settings | more)


def push_trainer():
    """A Tied-LoRA adapter, pushed after every step and at the end."""
    model = tied_lora(base(), **SETTINGS)
    more = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "all_checkpoints", "hub_always_push": True}
    trainer = Trainer(model, arguments("trainer", **more), train_dataset=Sentences())
    trainer.train()
    trainer.push_to_hub()
    resumed = Trainer(
        tied_lora(base(), seed=5, **SETTINGS), arguments("trainer", max_steps=3, push_to_hub=False),
        train_dataset=Sentences(),
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=True)
    return {"logits": values(outputs(model.eval())), "resumed": resumed.state.global_step}


def push_tied_trainer():
    model = tie(untied_model("llama"), "two_way", init_from="target")
    trainer = Trainer(model, arguments("tied-trainer", save_strategy="no"), train_dataset=Sentences())
    trainer.train()
    trainer.push_to_hub()
    return {"logits": values(logits(model))}


def push_sft():
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = train_byte_level_bpe(["a few words and some more"] * 5, 300)
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    data = Dataset.from_list([{"text": "few words"}] * 4)
    settings = SFTConfig(**{
        **arguments("sft", save_strategy="steps", save_steps=1).to_dict(), "bf16": False,
        "output_dir": str(WORK / "sft"), "gradient_checkpointing": False, "max_length": 8,
    })  # fmt: skip
    tiny_model("llama", vocab_size=len(tokenizer)).push_to_hub("base-of-sft")
    model = tied_lora(AutoModelForCausalLM.from_pretrained("tester/base-of-sft"), **SETTINGS)
    trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub()
    return {"logits": values(outputs(trainer.model.eval()))}


def push_lora():
    """An ordinary LoRA, which is none of this package's business."""
    model = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.push_to_hub("lora")
    return {}


def push_local_bases():
    """Adapters over a model from a folder, in each way of pushing."""
    tiny_model("llama").save_pretrained(WORK / "folder")

    def local():
        return AutoModelForCausalLM.from_pretrained(WORK / "folder")

    found = {}
    model = tied_lora(local(), **SETTINGS)
    with refused() as found["peft"]:
        model.push_to_hub("local")
    with refused() as found["tied_only"]:
        model.push_to_hub("local", also_lora=False)
    with refused() as found["trainer"]:
        Trainer(model, arguments("local"), train_dataset=Sentences())
    if not NATIVE_REFUSAL:
        native = local()
        native.add_adapter(TiedLoraConfig(**SETTINGS))
        with refused() as found["native"]:
            native.push_to_hub("local")
        with refused() as found["native_save"]:
            native.save_pretrained(WORK / "native", push_to_hub=True, repo_id="local")
    os.chdir(WORK)
    AutoModelForCausalLM.from_pretrained("folder")
    with refused() as found["relative"]:
        tied_lora(AutoModelForCausalLM.from_pretrained("folder"), **SETTINGS).push_to_hub("local")
    # The way out that the message names.
    model.peft_config["default"].base_model_name_or_path = BASE
    model.push_to_hub("mended")
    return {name: message["text"] for name, message in found.items()}


def push_local_tied():
    """A tied model that was loaded from a folder, which stock writes into no card either."""
    tie(untied_model("llama"), "two_way", init_from="target").save_pretrained(WORK / "tied-folder")
    model = AutoModelForCausalLM.from_pretrained(WORK / "tied-folder")
    trainer = Trainer(model, arguments("from-folder", save_strategy="no", max_steps=1), train_dataset=Sentences())
    trainer.train()
    trainer.push_to_hub()
    return {"place": str(WORK)}


def push_published():
    """`publish`: a tied model with its blocks run, before the upload and after it; an adapter on a branch."""
    from hf_tying.hub import publish

    tie(untied_model("llama"), "two_way", init_from="target").save_pretrained(WORK / "published")
    first = publish(WORK / "published", "published", license="mit")
    again = publish(WORK / "published", "published", license="mit", run=False)
    tied_lora(base(), **SETTINGS).save_pretrained(WORK / "adapter")
    publish(WORK / "adapter", "published-adapter", revision="dev", run=False)
    pull = publish(WORK / "adapter", "published-adapter", create_pr=True, run=False)
    return {"first": first.to_dict(), "same": first.url == again.url, "pull": pull.url}


if __name__ == "__main__":
    run_cases({
        name.removeprefix("push_"): case for name, case in list(globals().items()) if name.startswith("push_")
    })  # fmt: skip
