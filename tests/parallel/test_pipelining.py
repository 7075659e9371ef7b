"""Stages that torch cuts out of a tied model: evaluated as the model, and not trained apart."""

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import SplitPoint, pipeline

from hf_tying import TyingError, tie


class Small(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(self.embedding(ids)).tanh()))


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.held = tie(Small(), ["embedding.weight", "head.weight"], init_from="embedding.weight")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.held(ids)


IDS = torch.arange(6).reshape(2, 3)


@pytest.mark.parametrize(
    ("make", "block"), [(lambda: Holder().held, "second"), (Holder, "held.second")], ids=["itself", "a part"]
)
def test_stages_of_a_tied_model_are_evaluated_and_not_trained(make, block):
    model = make()
    pipe = pipeline(model, mb_args=(IDS,), split_spec={block: SplitPoint.BEGINNING})
    [logits] = pipe(IDS)
    assert torch.equal(logits, model(IDS))
    with pytest.raises(TyingError, match="Cannot train Small in pipeline stages: each use of group '.*embedding."):
        logits.sum().backward()


def test_stages_of_an_untied_model_are_trained():
    pipe = pipeline(Small(), mb_args=(IDS,), split_spec={"second": SplitPoint.BEGINNING})
    pipe(IDS)[0].sum().backward()
    # torch detaches what a stage is given: without a schedule, the last one alone has gradients.
    trained = [name for name, p in pipe.split_gm.named_parameters() if p.grad is not None]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in trained} == {"second", "head"}
