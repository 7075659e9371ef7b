"""The bytes that DDP reduces in a step, beside those of a plan: started by `run_script`."""

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from hf_tying.parallel import parallel_plan
from tests.engines import inputs, own_rows, start
from tests.processes import run_cases


def reduced(kind: str) -> dict:
    model = start(kind)
    wrapped, seen = DistributedDataParallel(model), []

    def counted(group, bucket):
        seen.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, counted)
    wrapped(**inputs(model, own_rows())).loss.backward()
    plan = parallel_plan(model, {"dp": dist.get_world_size()})
    return {"reduced": sum(seen), "planned": sum(c.payload for group in plan.groups for c in group.collectives)}


CASES = {
    kind: lambda kind=kind: reduced(kind)
    for kind in ("llama two_way", "bart three_way", "bart source_target", "llama layers", "llama tied loss")
}

if __name__ == "__main__":
    run_cases(CASES)
