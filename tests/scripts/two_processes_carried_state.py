"""An LSTM is trained with a carried state, by one process or by two, each on half of the columns: see `run_script`."""

import functools
import itertools
import tempfile

import torch

from hf_tying import use_tied_loss
from hf_tying.data.words import ContiguousText
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM
from hf_tying.training.carried_state import CarriedStateArguments, CarriedStateTrainer
from tests.processes import run_cases

WORDS, BATCH, STEPS = 20, 4, 5


def trained(sum_over_time: bool, tied_loss: bool) -> dict:
    torch.manual_seed(0)
    config = TiedLSTMConfig(
        vocab_size=WORDS,
        embedding_size=8,
        hidden_size=8,
        tying={"version": 1, "scheme": "two_way", "projection": {}},
    )
    model = TiedLSTMForCausalLM(config)
    if tied_loss:
        use_tied_loss(model)
    tokens = torch.randint(0, WORDS, (BATCH * (STEPS * 6 + 1),), generator=torch.Generator().manual_seed(1))
    seen = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    with tempfile.TemporaryDirectory() as folder:
        args = CarriedStateArguments(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=BATCH,
            sum_over_time=sum_over_time,
            decay=0.5,
            save_strategy="no",
            logging_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        CarriedStateTrainer(model, args, train_dataset=ContiguousText(tokens, BATCH, STEPS)).train()
    weights = {str(name): p.detach().flatten().tolist() for name, p in model.named_parameters()}
    return {"processes": args.world_size, "weights": weights, "seen": seen}


CASES = {
    f"sum over time {summed}, tied loss {tied_loss}": functools.partial(trained, summed, tied_loss)
    for summed, tied_loss in itertools.product((True, False), repeat=2)
}

if __name__ == "__main__":
    run_cases(CASES)
