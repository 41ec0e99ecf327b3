"""The console's lines against the ones upstream printed."""

from __future__ import annotations

import re

from neox.config import from_dict
from neox.train import console
from neox.train.metrics import flops_per_iteration

NUMBER = re.compile(r"-?\d+\.\d+(?:E[+-]\d+)?|\d+")


def test_training_lines_are_the_same_to_the_character(shared):
    printed = (shared / "upstream/curves/train_mp1pp1_printed_lines.txt").read_text().splitlines()
    lines = [line for line in printed if line.startswith(" samples/sec")]
    config = from_dict(
        {
            "num_layers": 4,
            "hidden_size": 128,
            "num_attention_heads": 8,
            "seq_length": 128,
            "max_position_embeddings": 128,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
        }
    )
    flops = flops_per_iteration(config, padded_vocab_size=1152)
    for line in lines:
        samples, iteration, total, milliseconds, rate, _, loss, skipped, nan = map(
            float, NUMBER.findall(line)
        )
        ours = console.training_line(
            iteration=int(iteration),
            train_iters=int(total),
            samples_per_second=samples,
            seconds_per_iteration=milliseconds / 1000,
            learning_rate=rate,
            flops_per_second=flops * samples / 8,  # 4 sequences x 2 accumulation steps
            utilization=None,
            losses={"lm_loss": loss},
            loss_scale=None,
            skipped=int(skipped),
            nan=int(nan),
        )
        assert ours == line
    assert len(lines) == 20


def test_evaluation_lines_are_the_same_to_the_character(shared):
    printed = (shared / "upstream/curves/train_mp1pp1_printed_lines.txt").read_text().splitlines()
    lines = [line for line in printed if " results at " in line]
    for line in lines:
        chart, at, loss, perplexity = re.fullmatch(
            r" (\w+) results at (.+) \| lm_loss value: (\S+) \| lm_loss_ppl value: (\S+) \| ", line
        ).groups()
        metrics = {"lm_loss": float(loss), "lm_loss_ppl": float(perplexity)}
        rule, ours, _ = console.evaluation_box(chart, at, metrics).split("\n")
        assert ours == line
        assert rule == "-" * (len(line) + 1)
    assert len(lines) == 4
