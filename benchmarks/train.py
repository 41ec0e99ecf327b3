"""Training speed and memory against transformers: the same model, batch and optimizer.

Ours is the engine that `./deepy.py train.py` uses; the peer is GPTNeoXForCausalLM (eager, SDPA)
with fused torch AdamW and clipping. A third contestant does the step's matrix products and nothing
else, as torch.mm does them, a fourth those of linear layers as neox.parallel.layers.linear. They
take turns (benchmarks/contestants.py). tokens_per_s_over_transformers is the median over the rounds
of one turn against the other, share_of_matmul_rate that of the third's time against our step's,
share_of_onednn_rate that of the fourth's, peak_memory_over_transformers the ratio of two processes'
peak resident memory.

    python benchmarks/train.py [--quick] [--json FILE]
    python benchmarks/train.py --breakdown        # where the time of our step goes
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from neox.config import NeoXConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.contestants import THREADS, Contestants, Turn  # noqa: E402
from neox import log  # noqa: E402
from neox.atomic import write_text  # noqa: E402

LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIPPING = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True)
class Shape:
    """A model, a micro-batch, and how often it is timed."""

    name: str
    layers: int
    hidden: int
    heads: int
    vocab: int
    sequence: int
    batch: int
    rounds: int
    steps: int  # per turn

    @property
    def tokens(self) -> int:
        """Tokens of one turn."""
        return self.steps * self.batch * self.sequence


FULL = Shape("70M", 6, 512, 8, 50304, sequence=512, batch=4, rounds=9, steps=1)
QUICK = Shape("tiny", 2, 128, 4, 2048, sequence=128, batch=4, rounds=9, steps=3)

Step = Callable[[], float]  # one optimizer step; returns its loss


def configuration(shape: Shape) -> NeoXConfig:
    """Of ours."""
    from neox.config import from_dict

    return from_dict(
        {
            "num_layers": shape.layers,
            "hidden_size": shape.hidden,
            "num_attention_heads": shape.heads,
            "seq_length": shape.sequence,
            "max_position_embeddings": shape.sequence,
            "pos_emb": "rotary",
            "rotary_pct": 0.25,
            "gpt_j_residual": True,
            "no_weight_tying": True,
            "precision": "fp32",
            "train_micro_batch_size_per_gpu": shape.batch,
            "optimizer": {
                "type": "Adam",
                "params": {"lr": LEARNING_RATE, "betas": list(BETAS), "eps": EPSILON},
            },
            "weight_decay": WEIGHT_DECAY,
            "gradient_clipping": CLIPPING,
            "train_iters": 1000,
        }
    )


def ours(shape: Shape) -> Step:
    """A step of the engine behind train.py, on one process."""
    import itertools

    import torch

    from neox.data.loaders import Batch
    from neox.engine.build import build_engine
    from neox.parallel.groups import ProcessGroups

    config = configuration(shape)
    tokens = random_tokens(shape)
    labels = tokens.roll(-1, dims=1)
    batches = itertools.repeat(Batch(tokens, labels, torch.ones(labels.shape)))
    engine = build_engine(config, ProcessGroups.single(), shape.vocab)
    iterations = itertools.count(1)
    return lambda: engine.train_batch(batches, next(iterations), LEARNING_RATE).loss


def transformers(shape: Shape) -> Step:
    """A plain training step of the peer."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.hidden,
            max_position_embeddings=shape.sequence,
            rotary_pct=0.25,
            use_parallel_residual=True,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            use_cache=False,
        )
    ).train()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors}],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=0.0,
        fused=True,
    )
    tokens = random_tokens(shape)

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def fast_products(shape: Shape) -> Step:
    """`products` with those of linear layers by the product that ours uses, oneDNN's on a CPU."""
    from neox.engine.memory import keep_freed_memory
    from neox.parallel.layers import linear

    keep_freed_memory()  # as ours does

    def multiply(x: Tensor, w: Tensor, grad_y: Tensor) -> None:
        linear(x, w)
        linear(grad_y, w.t())
        linear(grad_y.t(), x.t())

    return products(shape, multiply)


def products(
    shape: Shape, multiply: Callable[[Tensor, Tensor, Tensor], None] | None = None
) -> Step:
    """The matrix products of one step, forward and backward, each once, into memory that is there.

    Every layer has its own operands, as in the step. Attention's products are made in blocks of 64
    queries with the keys up to the block's last: what lies beyond is masked and not needed.
    """
    import torch

    T, H, S = shape.batch * shape.sequence, shape.hidden, shape.sequence
    sizes = [(H, 3 * H), (H, H), (H, 4 * H), (4 * H, H)] * shape.layers + [(H, shape.vocab)]
    linears = [(torch.randn(T, k), torch.randn(n, k), torch.randn(T, n)) for k, n in sizes]
    results = [tuple(torch.empty_like(t) for t in operands) for operands in linears]
    heads = shape.batch * shape.heads, S, H // shape.heads
    q, k, v, dy = (torch.randn(heads) for _ in range(4))

    def attention() -> None:
        for start in range(0, S, 64):
            stop = min(start + 64, S)
            rows, seen = slice(start, stop), slice(stop)
            scores = torch.bmm(q[:, rows], k[:, seen].mT)
            torch.bmm(scores, v[:, seen])
            grad_scores = torch.bmm(dy[:, rows], v[:, seen].mT)
            torch.bmm(grad_scores, k[:, seen])
            torch.bmm(grad_scores.mT, q[:, rows])
            torch.bmm(scores.mT, dy[:, rows])

    def fast_step() -> float:
        assert multiply is not None
        for operands in linears:
            multiply(*operands)
        for _ in range(shape.layers):
            attention()
        return math.nan

    def step() -> float:
        for (x, w, _), (_, _, y) in zip(linears, results, strict=True):
            torch.mm(x, w.t(), out=y)
        for _ in range(shape.layers):
            attention()
        for (x, w, grad_y), (grad_x, grad_w, _) in zip(linears, results, strict=True):
            torch.mm(grad_y, w, out=grad_x)
            torch.mm(grad_y.t(), x, out=grad_w)
        return math.nan

    return step if multiply is None else fast_step


def random_tokens(shape: Shape) -> Tensor:
    """int64 [batch, sequence], the same for both."""
    import torch

    generator = torch.Generator().manual_seed(1234)
    return torch.randint(shape.vocab, (shape.batch, shape.sequence), generator=generator)


def turns(build: Callable[[Shape], Step], shape: Shape) -> Turn:
    """A contestant that is asked for so many steps and answers the last one's loss."""
    step = build(shape)
    step()  # optimizer state and buffers come with the first step
    return lambda steps: [step() for _ in range(steps)][-1]


def compete(shape: Shape) -> tuple[dict[str, list[float]], dict[str, float], dict[str, int]]:
    """For each contestant: tokens/s of every round, the last loss, peak memory in bytes."""
    builds = {"ours": ours, "transformers": transformers, "products": products}
    builds["fast products"] = fast_products
    contestants = Contestants(
        {name: partial(turns, build, shape) for name, build in builds.items()}
    )
    speeds: dict[str, list[float]] = {name: [] for name in builds}
    losses = dict.fromkeys(builds, math.nan)
    bar = log.progress(total=shape.rounds, desc=shape.name, unit=" rounds")
    for i in range(shape.rounds):
        for name, (seconds, losses[name]) in contestants.round(i, shape.steps).items():
            speeds[name].append(shape.tokens / seconds)
        bar.update(1)
    bar.close()
    return speeds, losses, contestants.end()


# Operators of our step by what they are for; the first row whose word is in an operator's name.
PARTS = {
    "attention": ("bmm", "aten::_softmax", "Attention", "scaled_dot_product"),
    "optimizer": ("adam", "foreach", "vector_norm"),
    "matrix products of linear layers": ("mm", "linear_pointwise"),
    "softmax of the loss": ("aten::exp", "amax", "sub_", "log", "gather", "scatter"),
    "norms, activations, rotary, residuals, copies": ("",),
}


def break_down(shape: Shape) -> None:
    """Print the share of each part in the operators' time, over some steps of ours."""
    log.quiet_third_parties()  # before torch is imported
    import torch
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(THREADS)
    step = ours(shape)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(shape.rounds):
            step()
    milliseconds = dict.fromkeys(PARTS, 0.0)
    for event in recorded.key_averages():
        part = next(p for p, words in PARTS.items() if any(w in event.key for w in words))
        milliseconds[part] += event.self_cpu_time_total / 1000 / shape.rounds
    total = sum(milliseconds.values())
    print(f"{'part':48}{'ms a step':>10}{'share':>8}")
    for part, spent in milliseconds.items():
        print(f"{part:48}{spent:10.0f}{spent / total:8.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model instead of the 70M one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--breakdown", action="store_true", help="the parts of our step instead")
    arguments = parser.parse_args()
    shape = QUICK if arguments.quick else FULL
    if arguments.breakdown:
        break_down(shape)
        return

    speeds, losses, memory = compete(shape)
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["transformers"], strict=True)]
    shares = [a / b for a, b in zip(speeds["ours"], speeds["products"], strict=True)]
    fast = speeds["fast products"]
    fast_shares = [a / b for a, b in zip(speeds["ours"], fast, strict=True)]
    figures = {
        "tokens_per_s_over_transformers": statistics.median(ratios),
        "share_of_matmul_rate": statistics.median(shares),
        "share_of_onednn_rate": statistics.median(fast_shares),
        "peak_memory_over_transformers": memory["ours"] / memory["transformers"],
    }

    print(
        f"{shape.name}: sequence {shape.sequence}, micro-batch {shape.batch}, fp32, "
        f"{THREADS} threads; medians of {shape.rounds} rounds"
    )
    print(f"{'':14}{'tokens/s':>10}{'peak GB':>10}{'loss':>10}")
    for name, values in speeds.items():
        gigabytes = memory[name] / 1e9
        loss = "" if math.isnan(losses[name]) else f"{losses[name]:.3f}"
        print(f"{name:14}{statistics.median(values):10.1f}{gigabytes:10.2f}{loss:>10}")
    speed, share, fast_share, peak = figures.values()
    print(f"{'ratio':14}{speed:10.3f}{peak:10.3f}   ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"share of the products' rate: {share:.3f} ({min(shares):.2f} to {max(shares):.2f})")
    print(f"share of the fast products' rate: {fast_share:.3f}")
    if arguments.json:
        write_text(arguments.json, json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
