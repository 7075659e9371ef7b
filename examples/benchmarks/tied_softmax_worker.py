"""What one process of `tied_softmax.py` measures: steps of one method at one shape, or the floor.

Events are printed as lines of JSON as soon as they are known, so that those of a process that is stopped are not lost.
"""

import json
import tempfile
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from hf_tying.losses import reference_cross_entropy, tied_cross_entropy, tied_embedding

#: The floor tries these sizes, and at each as many blocks as take this many seconds.
VOCABULARY_CHUNKS, TOKEN_CHUNKS, SAMPLE_SECONDS = (512, 1024, 2048, 8192), (256, 512), 0.2


def say(**event) -> None:
    print(json.dumps(event), flush=True)


def work(job: dict) -> None:
    """Do a job of `tied_softmax.measure`; whatever raises is the reason why there are no numbers."""
    started = time.monotonic()
    torch.manual_seed(job["seed"])
    try:
        if job["method"] == "floor":
            say(**floor(*job["shape"], job["device"], until=started + job["limit"] / 2))
        elif "whole" in job:
            model = Model(job["whole"], job["method"], job["layers"], job["length"], job["device"])
            model.step()  # makes the optimiser's state
            measure(model.step, model.more_memory, None, job, started)
        else:
            embed, loss = functions_of(job["method"])
            if job["first_round"]:
                say(**precision(embed, loss, job))
            layer = Layer(*job["shape"], job["device"])
            measure(
                partial(layer.step, embed, loss),
                partial(layer.more_memory, embed, loss),
                layer.matrix_bytes,
                job,
                started,
            )
    except Exception as error:
        say(failed=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def functions_of(method: str):
    """Embedding and loss of a method; raises where it cannot run."""
    if method == "tied":
        return tied_embedding, tied_cross_entropy
    if method == "naive":
        return F.embedding, naive_cross_entropy
    if method.startswith("torch_chunked"):
        rows = 256 if method.endswith("256") else None
        return F.embedding, partial(
            F.linear_cross_entropy, options=nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        )
    import_module({"liger": "liger_kernel", "cce": "cut_cross_entropy"}[method])
    return F.embedding, partial(tied_cross_entropy, backend=method)


def naive_cross_entropy(hidden, weight, labels):
    """`ForCausalLMLoss` of transformers."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=-100)


class Layer:
    """Embedding, a body of one matrix, tied softmax. Hidden states and logits are as large as those of a new model."""

    def __init__(self, n: int, d: int, v: int, dtype: str, device: str):
        self.ids, self.labels = torch.randint(v, (2, n), device=device)
        self.weight = nn.Parameter((torch.randn(v, d, device=device) * 0.02).to(getattr(torch, dtype)))
        self.body = nn.Parameter((torch.randn(d, d, device=device) / (0.02 * d**0.5)).to(self.weight.dtype))
        # A float32 copy of a bfloat16 matrix is one too.
        self.matrix_bytes = {v * d * self.weight.itemsize, v * d * 4}

    def step(self, embed, loss_of, tokens: int | None = None) -> torch.Tensor:
        self.weight.grad = self.body.grad = None
        loss = loss_of(self.hidden(embed)[:tokens], self.weight, self.labels[:tokens])
        loss.backward()
        return loss.detach()

    def more_memory(self, embed, loss_of, device: str) -> dict:
        """Where a value for each word and token takes as many bytes as a matrix, one token less tells them apart."""
        n, d = len(self.ids), len(self.body)
        if device == "cuda" or not (n in (d, 2 * d) or d == 2 * n):
            return {}
        with memory_of(device, self.matrix_bytes) as memory:
            self.step(embed, loss_of, n - 1)
        return {"matrices": memory["matrices"]}

    def hidden(self, embed=F.embedding) -> torch.Tensor:
        return torch.tanh(embed(self.ids, self.weight) @ self.body)


class Model:
    """A new model of transformers, of which a step has an optimiser's too."""

    def __init__(self, name: str, method: str, layers: int, length: int, device: str):
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

        if name == "GPT-2":
            model = GPT2LMHeadModel(GPT2Config(n_layer=layers))
        else:  # the width of Gemma 3 270M
            sizes = {"hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1}
            model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=262144, num_hidden_layers=layers, **sizes))
        self.model = model.to(device).train()
        if method == "tied":
            from hf_tying import use_tied_loss

            use_tied_loss(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
        self.ids, self.labels = torch.randint(model.config.vocab_size, (2, 1, length), device=device)

    def step(self) -> None:
        self.model(input_ids=self.ids, labels=self.labels).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def more_memory(self, device: str) -> dict:
        """The optimiser's own temporaries can be the peak of a step: that of the model alone."""
        with memory_of(device, None) as memory:
            self.model(input_ids=self.ids, labels=self.labels).loss.backward()
        self.optimizer.zero_grad()
        return {"model_peak_bytes": memory["peak_bytes"]}


def precision(embed, loss_of, job: dict) -> dict:
    """How far the gradient of W is from that in float64, and the loss from that in float32, at a smaller shape."""
    n, d, v, dtype = job["shape"]
    layer = Layer(min(n, 256), min(d, 256), min(v, 8192), dtype, job["device"])
    loss = layer.step(embed, loss_of).double()
    gradient = layer.weight.grad.double()
    with torch.no_grad():
        plain = reference_cross_entropy(layer.hidden().float(), layer.weight.float(), layer.labels)
    layer.weight, layer.body = (nn.Parameter(p.detach().double()) for p in (layer.weight, layer.body))
    layer.step(F.embedding, reference_cross_entropy)
    exact = layer.weight.grad
    return {
        "gradient_error": ((gradient - exact).norm() / exact.norm()).item(),
        "loss_difference": (loss - plain).abs().item(),
    }


def measure(step, more_memory, matrix_bytes: set[int] | None, job: dict, started: float) -> None:
    """A first step, in the first round with its memory; then timed ones, as many as the limit allows."""
    device = job["device"]

    def timed() -> tuple[float, float]:
        _wait(device)
        start, cpu = time.perf_counter(), time.process_time()
        step()
        _wait(device)
        return time.perf_counter() - start, time.process_time() - cpu

    if device == "cuda":
        step()  # libraries take their workspace in the first one
    say(began=time.time())
    with memory_of(device, matrix_bytes) if job["first_round"] else nullcontext({}) as memory:
        seconds, cpu = timed()
    say(first_seconds=seconds, first_cpu_seconds=cpu, **memory)
    if job["first_round"]:
        say(**more_memory(device))
    done, spent = 0, 0.0
    # Small shapes have more steps, a second of them, so that a median is one.
    while done < job["steps"] or (spent < 1 and done < 20 * job["steps"]):
        if time.monotonic() - started + 1.1 * seconds > job["limit"]:
            break
        seconds, cpu = timed()
        say(seconds=seconds, cpu_seconds=cpu)
        done, spent = done + 1, spent + seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def memory_of(device: str, matrix_bytes: set[int] | None):
    """Filled at its end: the peak above what there was before, and on a CPU how many V x D matrices were alive."""
    memory = {}
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield memory
        memory["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield memory
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    events = [event["args"] for event in events if event.get("name") == "[memory]"]
    total = peak = most = 0
    alive = set()
    for event in sorted(events, key=lambda event: event["Ev Idx"]):
        total += event["Bytes"]  # negative where memory is freed
        if event["Bytes"] in (matrix_bytes or ()):
            alive.add(event["Addr"])
        else:
            alive.discard(event["Addr"])
        peak, most = max(peak, total), max(most, len(alive))
    memory["peak_bytes"] = peak
    if matrix_bytes is not None:
        memory["matrices"] = most


def floor(n: int, d: int, v: int, dtype: str, device: str, until: float) -> dict:
    """Seconds of the three products, each at the best rate of any chunking, layout and dtype tried in time."""
    dtypes = dict.fromkeys((torch.float32, getattr(torch, dtype)))  # float32 too: blocks can be converted
    if dtype == "float64":
        del dtypes[torch.float32]
    chunkings = [(t, w) for w in (*VOCABULARY_CHUNKS, v) for t in (*TOKEN_CHUNKS, n) if w <= v and t <= n]
    chunkings = list(dict.fromkeys(chunkings))
    best: dict[str, tuple[float, str]] = {}
    tried, all_in_time = 0, True
    for kind in dtypes:
        hidden, weight = (torch.randn(rows, d, device=device).to(kind) for rows in (n, v))
        outputs = torch.zeros_like(hidden), torch.zeros_like(weight)
        for tokens, words in chunkings:
            if best and time.monotonic() > until:
                all_in_time = False
                break
            tried += 1
            found = {}
            for transposed in (False, True):
                for name, seconds in _products(hidden, weight, outputs, tokens, words, transposed).items():
                    found[name] = min(seconds, found.get(name, seconds))
            slow = best and all(seconds > 4 * best[name][0] for name, seconds in found.items())
            for name, seconds in found.items():
                if name not in best or seconds < best[name][0]:
                    best[name] = seconds, f"{tokens} x {words} in {str(kind).removeprefix('torch.')}"
            if slow and kind != torch.float32:
                break  # a dtype that this CPU does not multiply: larger blocks of it would take minutes
    products = {
        name: {"seconds": seconds, "chunk": chunk, "gflops": 2e-9 * n * d * v / seconds}
        for name, (seconds, chunk) in best.items()
    }
    return {
        "seconds": sum(seconds for seconds, _ in best.values()),
        "products": products,
        "chunkings": tried,
        "all_chunkings": all_in_time,
    }


def _products(hidden, weight, outputs, tokens: int, words: int, transposed: bool) -> dict[str, float]:
    """Seconds of each of the three over all chunks, from as many of them as there is time for."""
    shape = (words, tokens) if transposed else (tokens, words)
    memory = torch.randn(shape, device=hidden.device).to(hidden.dtype)
    block = memory.t() if transposed else memory  # (tokens, words), however it lies
    into_hidden, into_weight = outputs

    def logits(t, w):
        if transposed:
            torch.mm(weight[w], hidden[t].t(), out=memory)
        else:
            torch.mm(hidden[t], weight[w].t(), out=memory)

    calls = {
        "hidden": lambda t, w: into_hidden[t].addmm_(block, weight[w]),
        "weight": lambda t, w: into_weight[w].addmm_(block.t(), hidden[t], beta=0.0 if t.start == 0 else 1.0),
        "logits": logits,
    }
    seconds = {}
    for name, call in calls.items():
        done, start = 0, time.perf_counter()
        for first in range(0, len(weight) - words + 1, words):
            for token in range(0, len(hidden) - tokens + 1, tokens):
                call(slice(token, token + tokens), slice(first, first + words))
                done += tokens * words
            _wait(hidden.device.type)
            if time.perf_counter() - start > SAMPLE_SECONDS:
                break
        seconds[name] = (time.perf_counter() - start) * len(hidden) * len(weight) / done
    return seconds
