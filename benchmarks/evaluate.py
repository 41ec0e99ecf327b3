"""Documents per second against lm-eval's own HF backend: the same weights, tokens and documents.

Ours is the adapter behind evaluate.py, the peer lm-eval's HFLM over GPTNeoXForCausalLM with the
same random weights. They take turns on the same documents (benchmarks/contestants.py);
lambada_over_lm_eval_hf and piqa_over_lm_eval_hf are medians over the rounds of one turn against the
other. A turn is lm-eval's `loglikelihood`: tokenization, forward passes, scores. Both must give the
same scores.

    python benchmarks/evaluate.py [--quick] [--json FILE] [--data DIR] [--tokenizer FILE]

--data: a folder with LAMBADA's and PIQA's files; without it, the documents of the demo.
--tokenizer: a tokenizer.json; without it, one is trained on the text that Python carries.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.contestants import THREADS, Contestants, Turn  # noqa: E402
from neox import log  # noqa: E402
from neox.atomic import write_text  # noqa: E402

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from torch import nn

    from neox.config import NeoXConfig
    from neox.inference.stages import InferenceModel
    from neox.model.gpt import Layer

BATCH_SIZE = 8
SEQUENCE = 2048
DEMO = ROOT / "configs" / "demo_eval"
FIGURES = {"lambada_openai": "lambada_over_lm_eval_hf", "piqa": "piqa_over_lm_eval_hf"}


@dataclass(frozen=True)
class Shape:
    """A model, and how often it is timed on how many documents."""

    name: str
    layers: int
    hidden: int
    heads: int
    vocab: int
    rounds: int
    documents: int  # per turn


FULL = Shape("70M", 6, 512, 8, 50304, rounds=5, documents=256)
QUICK = Shape("tiny", 2, 128, 4, 8192, rounds=5, documents=16)

Scores = list[tuple[float, bool]]
Contestant = Callable[["list[Instance]"], Scores]


def configuration(shape: Shape, data: Path) -> NeoXConfig:
    from neox.config import from_dict

    return from_dict(
        {
            "num_layers": shape.layers,
            "hidden_size": shape.hidden,
            "num_attention_heads": shape.heads,
            "seq_length": SEQUENCE,
            "max_position_embeddings": SEQUENCE,
            "pos_emb": "rotary",
            "rotary_pct": 0.25,
            "gpt_j_residual": True,
            "no_weight_tying": True,
            "precision": "fp32",
            "train_micro_batch_size_per_gpu": BATCH_SIZE,
            "eval_tasks": list(FIGURES),
            "eval_data_dir": str(data),
            "eval_own_documents": data == DEMO,
        }
    )


def peer_model(shape: Shape) -> Any:
    """GPTNeoXForCausalLM, the same random weights in every process."""
    import torch
    import transformers

    torch.manual_seed(1234)
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.hidden,
            max_position_embeddings=SEQUENCE,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
            use_parallel_residual=True,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    ).eval()


def theirs(config: NeoXConfig, shape: Shape, tokenizer_file: Path) -> Contestant:
    import transformers
    from lm_eval.models.huggingface import HFLM

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    lm = HFLM(
        pretrained=peer_model(shape), tokenizer=tokenizer, batch_size=BATCH_SIZE, device="cpu"
    )
    return lambda requests: lm.loglikelihood(requests, disable_tqdm=True)


def ours(config: NeoXConfig, shape: Shape, tokenizer_file: Path) -> Contestant:
    from neox.evaluation.adapter import NeoXLM
    from neox.tokenizer import load_tokenizer

    model = our_model(config, shape, peer_model(shape).state_dict())
    tokenizer = load_tokenizer("HFTokenizer", str(tokenizer_file))

    def score(requests: list[Instance]) -> Scores:
        # Anew each time: it would know the answers of an earlier turn.
        lm = NeoXLM(
            lambda: model, tokenizer, model.groups, SEQUENCE, batch_size=None, seed=config.seed
        )
        return lm.loglikelihood(requests)

    return score


def turns(build: Callable[..., Contestant], shape: Shape, data: Path, tokenizer: Path) -> Turn:
    """A contestant that is asked for (task, round) and answers (number of documents, scores).

    A round's documents are drawn from the task's, the same by every contestant.
    """
    config = configuration(shape, data)
    with contextlib.redirect_stdout(io.StringIO()):
        documents = requests_by_document(config)
    contestant = build(config, shape, tokenizer)

    def turn(order: tuple[str, int]) -> tuple[int, Scores]:
        task, number = order
        known = documents[task]
        drawn = random.Random(number).sample(known, min(shape.documents, len(known)))
        return len(drawn), contestant([instance for requests in drawn for instance in requests])

    return turn


def our_model(config: NeoXConfig, shape: Shape, weights: dict[str, Any]) -> InferenceModel:
    """InferenceModel with the peer's weights, which have other names."""
    import torch

    from neox.inference.stages import InferenceModel
    from neox.model.gpt import build_layers, layers
    from neox.parallel.groups import ProcessGroups

    names = {
        "word_embeddings.weight": "gpt_neox.embed_in.weight",
        "norm.weight": "gpt_neox.final_layer_norm.weight",
        "norm.bias": "gpt_neox.final_layer_norm.bias",
        "final_linear.weight": "lm_head.weight",
    }

    def fill(module: nn.Module, layer: Layer) -> None:
        for name, parameter in module.named_parameters():
            inside = name.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h")
            peer_name = names.get(name, f"gpt_neox.layers.{layer.index - 2}.{inside}")
            parameter.data.copy_(weights[peer_name])

    groups = ProcessGroups.single()
    stage = build_layers(layers(config, shape.vocab, torch.float32, groups), fill)
    return InferenceModel(config, groups, stage, shape.vocab, torch.float32)


def requests_by_document(config: NeoXConfig) -> dict[str, list[list[Instance]]]:
    """For each task, the requests of each of its documents."""
    from neox.evaluation.tasks import load_tasks, silenced

    documents: dict[str, list[list[Instance]]] = {}
    for name, task in load_tasks(config)["tasks"].items():
        with silenced():
            task.build_all_requests()
        by_document: dict[int, list[Instance]] = {}
        for instance in task.instances:
            by_document.setdefault(instance.doc_id, []).append(instance)
        documents[name] = list(by_document.values())
    return documents


def train_tokenizer(folder: Path) -> Path:
    """Byte-level BPE on the documentation of Python's topics."""
    import pydoc_data.topics

    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def compete(
    shape: Shape, contestants: Contestants, task: str
) -> tuple[dict[str, list[float]], float]:
    """Documents/s of every round by contestant, and the largest relative difference of scores."""
    speeds: dict[str, list[float]] = {name: [] for name in contestants.names}
    difference = 0.0
    bar = log.progress(total=shape.rounds, desc=task, unit=" rounds")
    for i in range(shape.rounds + 1):  # round 0 warms up
        turns = contestants.round(i, (task, i))
        for name, (seconds, (documents, _)) in turns.items():
            if i > 0:
                speeds[name].append(documents / seconds)
        scores = [answer[1] for _, answer in turns.values()]
        for (a, _), (b, _) in zip(*scores, strict=True):
            difference = max(difference, abs(a - b) / abs(b))
        bar.update(i > 0)
    bar.close()
    return speeds, difference


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model instead of the 70M one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--data", type=Path, default=DEMO, metavar="DIR")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    shape = QUICK if arguments.quick else FULL

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = arguments.tokenizer or train_tokenizer(Path(folder))
        given = (shape, arguments.data, tokenizer)
        contestants = Contestants(
            {"ours": partial(turns, ours, *given), "lm-eval hf": partial(turns, theirs, *given)}
        )

    print(
        f"{shape.name}: fp32, {THREADS} threads, theirs at batch size {BATCH_SIZE}; medians of "
        f"{shape.rounds} rounds of {shape.documents} documents"
    )
    columns = "".join(f"{name:>12}" for name in contestants.names)
    print(f"{'documents/s':16}{columns}{'ratio':>9}")
    figures = {}
    for task, figure in FIGURES.items():
        speeds, difference = compete(shape, contestants, task)
        ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
        figures[figure] = statistics.median(ratios)
        print(
            f"{task:16}"
            + "".join(f"{statistics.median(values):12.1f}" for values in speeds.values())
            + f"{figures[figure]:9.3f}   ({min(ratios):.2f} to {max(ratios):.2f}; "
            f"scores agree to {difference:.0e})"
        )
    contestants.end()
    if arguments.json:
        write_text(arguments.json, json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
