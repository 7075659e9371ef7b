"""Two processes train an LSTM with a carried state, each on half of the columns; process 0 prints what came out."""

import json
import sys

import torch

from hf_tying import use_tied_loss
from hf_tying.data.words import ContiguousText
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM
from hf_tying.training.carried_state import CarriedStateArguments, CarriedStateTrainer

WORDS, BATCH, STEPS = 20, 4, 5


def train(folder: str, sum_over_time: bool, tied_loss: bool) -> tuple:
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
    tokens = torch.randint(0, WORDS, (BATCH * (STEPS * 6 + 1),), generator=torch.Generator().manual_seed(1))
    trainer = CarriedStateTrainer(model, args, train_dataset=ContiguousText(tokens, BATCH, STEPS))
    seen = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    trainer.train()
    perplexities = [log["train_perplexity"] for log in trainer.state.log_history if "train_perplexity" in log]
    return {str(n): p.detach().flatten().tolist() for n, p in model.named_parameters()}, seen, perplexities, args


def main(folder: str) -> None:
    results = {}
    for sum_over_time in (True, False):
        for tied_loss in (True, False):
            weights, seen, perplexities, args = train(folder, sum_over_time, tied_loss)
            results[f"{sum_over_time}, {tied_loss}"] = {"weights": weights, "seen": seen, "perplexities": perplexities}
    if args.process_index == 0:
        print("RESULTS " + json.dumps({"processes": args.world_size, "cases": results}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
