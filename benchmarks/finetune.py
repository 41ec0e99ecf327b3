"""Fine-tuning on one small card: memory and speed against transformers, PEFT and bitsandbytes.

The same GPT-J, of random weights saved by transformers in float16, its matrices held in 8 bits;
LoRA of rank 16 on every matrix but the output projection, 8-bit Adam, activation checkpointing,
float32 arithmetic. The two take turns, each in a process of its own, a step each per round.
tokens_per_s_over_peft is the median over the rounds of one against the other, peak_memory_over_peft
the ratio of the processes' peak resident memory, loading included.

    python benchmarks/finetune.py [--quick] [--json FILE]
    python benchmarks/finetune.py --model FOLDER [--json FILE]     # a step of ours, by component

The second form takes a model of any format that `load` takes, such as GPT-J-6B in float16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from contestants import THREADS, Contestants, Turn, peak_memory  # noqa: E402

from neox import log  # noqa: E402
from neox.atomic import write_text  # noqa: E402

RANK, ALPHA, LEARNING_RATE = 16, 32.0, 1e-4


@dataclass(frozen=True)
class Shape:
    """A GPT-J, a micro-batch of one sample, and how often a step is timed."""

    name: str
    layers: int
    hidden: int
    heads: int
    vocab: int
    sequence: int
    rounds: int


FULL = Shape("570M", 8, 2048, 16, 50400, sequence=128, rounds=7)
QUICK = Shape("tiny", 2, 256, 4, 2048, sequence=64, rounds=5)


def write_model(shape: Shape, folder: Path) -> None:
    """What both load: random weights in float16, written by transformers."""
    log.quiet_third_parties()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers finds DeepSpeed, which would look
    import torch
    from transformers import GPTJConfig, GPTJForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(1)
    config = GPTJConfig(
        vocab_size=shape.vocab,
        n_positions=2048,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        rotary_dim=shape.hidden // shape.heads // 4,
    )
    GPTJForCausalLM(config).to(torch.float16).save_pretrained(folder)


def random_tokens(vocab: int, sequence: int) -> Tensor:
    """int64 [1, sequence], the same for both."""
    import torch

    return torch.randint(vocab, (1, sequence), generator=torch.Generator().manual_seed(1234))


def ours(folder: Path, sequence: int) -> Turn:
    """A step of the engine behind train.py."""
    step, _ = engine_step(folder, sequence)
    return lambda order: step()


def engine_step(folder: Path, sequence: int) -> tuple[Callable[[], float], Any]:
    import itertools

    import torch

    from neox.checkpoint.architecture import describe
    from neox.checkpoint.neox import Checkpoint
    from neox.config import from_dict
    from neox.data.loaders import Batch
    from neox.engine.build import build_engine
    from neox.parallel.groups import ProcessGroups

    checkpoint = Checkpoint.open(folder)
    config = from_dict(
        {
            **describe(checkpoint),
            "load": str(folder),
            "seq_length": sequence,
            "precision": "fp32",
            "load_in_8bit": True,
            "lora": {"rank": RANK, "alpha": ALPHA},
            "use_bnb_optimizer": True,
            "optimizer": {"type": "Adam", "params": {"lr": LEARNING_RATE}},
            "checkpoint_activations": True,
            "train_micro_batch_size_per_gpu": 1,
            "pipe_parallel_size": 0,
            "train_iters": 1000,
        }
    )
    engine = build_engine(config, ProcessGroups.single(), checkpoint.padded_vocab_size, checkpoint)
    tokens = random_tokens(checkpoint.padded_vocab_size, sequence)
    labels = tokens.roll(-1, dims=1)
    batches = itertools.repeat(Batch(tokens, labels, torch.ones(labels.shape)))
    iterations = itertools.count(1)

    def step() -> float:
        return engine.train_batch(batches, next(iterations), LEARNING_RATE).loss

    return step, engine


def peft(folder: Path, sequence: int) -> Turn:
    """A plain step of the peers together."""
    import torch

    from neox.model.quantized import silently

    with silently():
        from bitsandbytes.optim import AdamW8bit
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    ).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW8bit(trained, lr=LEARNING_RATE)
    tokens = random_tokens(model.config.vocab_size, sequence)

    def step(order: Any) -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def compete(shape: Shape) -> dict[str, float]:
    """Run the rounds, print the table, return the figures."""
    with tempfile.TemporaryDirectory(prefix="neox-finetune-") as temporary:
        folder = Path(temporary) / "model"
        write_model(shape, folder)
        contestants = Contestants(
            {
                "ours": partial(ours, folder, shape.sequence),
                "peft": partial(peft, folder, shape.sequence),
            }
        )
        contestants.round(0, True)  # optimizer state and buffers come with the first step
        speeds: dict[str, list[float]] = {"ours": [], "peft": []}
        losses: dict[str, float] = {}
        with log.progress(total=shape.rounds, desc=shape.name, unit=" rounds") as bar:
            for number in range(shape.rounds):
                for name, (seconds, loss) in contestants.round(number, True).items():
                    speeds[name].append(shape.sequence / seconds)
                    losses[name] = loss
                bar.update(1)
        memory = contestants.end()
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["peft"], strict=True)]
    figures = {
        "tokens_per_s_over_peft": statistics.median(ratios),
        "peak_memory_over_peft": memory["ours"] / memory["peft"],
    }
    print(
        f"{shape.name}: sequence {shape.sequence}, batch 1, 8-bit base, LoRA {RANK}, 8-bit Adam, "
        f"{THREADS} threads; medians of {shape.rounds} rounds"
    )
    print(f"{'':14}{'tokens/s':>10}{'peak GB':>10}{'loss':>10}")
    for name, values in speeds.items():
        speed = statistics.median(values)
        print(f"{name:14}{speed:10.1f}{memory[name] / 1e9:10.2f}{losses[name]:10.3f}")
    speed, peak = figures.values()
    print(f"{'ratio':14}{speed:10.3f}{peak:10.3f}   ({min(ratios):.2f} to {max(ratios):.2f})")
    return figures


def by_component(folder: Path, sequence: int) -> dict[str, float]:
    """Load, take two steps, and print where the memory is. In this process."""
    log.quiet_third_parties()
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(THREADS)
    import deepspeed  # noqa: F401

    libraries = resident()
    started = time.perf_counter()
    step, engine = engine_step(folder, sequence)
    loading, after_loading = time.perf_counter() - started, peak_memory()
    loss = step()
    started = time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - started
    modules = [module for _, module in engine.local if isinstance(module, torch.nn.Module)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    trained = sum(size(p) for p in parameters if p.requires_grad)
    frozen = sum(size(p) for p in parameters if not p.requires_grad)
    frozen += sum(size(buffer) for module in modules for buffer in module.buffers())
    optimizer = engine.inner.optimizer
    state = sum(
        size(value)
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor) and value.numel() > 256  # not the shared tables
    )
    parts = {
        "libraries": libraries,
        "frozen weights": frozen,
        "adapters": trained,
        "their gradients": trained,
        "optimizer state": state,
    }
    parts["activations and workspace"] = peak_memory() - sum(parts.values())
    whole = peak_memory() / 2**30
    for name, held in parts.items():
        print(f"{name:28}{held / 2**30:8.2f} GiB")
    print(f"{'peak':28}{whole:8.2f} GiB, {after_loading / 2**30:.2f} of them while loading")
    print(f"loading {loading:.0f} s, a step of {sequence} tokens {seconds:.1f} s, loss {loss:.3f}")
    figures = {f"{name.replace(' ', '_')}_gib": held / 2**30 for name, held in parts.items()}
    return {**figures, "peak_gib": whole, "loading_peak_gib": after_loading / 2**30}


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def resident() -> int:
    """Bytes of this process's resident memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="ours only, by component")
    parser.add_argument("--sequence", type=int, default=128, metavar="N", help="tokens (--model)")
    arguments = parser.parse_args()
    if arguments.model is not None:
        figures = by_component(arguments.model, arguments.sequence)
    else:
        figures = compete(QUICK if arguments.quick else FULL)
    if arguments.json:
        write_text(arguments.json, json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
