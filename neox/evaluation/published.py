"""Figures that others published of known models, to be shown beside ours.

A model is known by its shape and by the iteration of its published checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from neox.config import NeoXConfig


@dataclass(frozen=True)
class Published:
    """A model whose weights and scores are public. The scores are zero-shot, of whole tasks."""

    name: str
    shape: tuple[int, int, int]  # num_layers, hidden_size, num_attention_heads
    iteration: int  # of the published checkpoint
    source: str
    figures: dict[tuple[str, str], str]  # (task, metric) -> as published, with all of its digits
    shares_norm: bool = False


class Comparison(NamedTuple):
    """A published figure, and how far ours is from it."""

    published: str
    agrees: bool
    distance: float | None  # in standard errors of ours; None where there is no standard error


def find(config: NeoXConfig, iteration: int | None) -> Published | None:
    """The published model that a checkpoint seems to be; None if its shape or iteration is another.

    `iteration` is the checkpoint's; None or 0 is unknown, as of a transformers folder, and then the
    shape decides alone. Of two models of one shape, `load` chooses: the deduped one if its path
    says "dedup", the plain one if not.
    """
    found = [
        model
        for model in MODELS
        if _has_shape(config, model) and (not iteration or iteration == model.iteration)
    ]
    if len(found) > 1:
        # As it was written, and in full: `load` may be "." or a link of either name.
        paths = f"{config.load} {Path(config.load).resolve()}".lower() if config.load else ""
        found = [model for model in found if ("dedup" in model.name) == ("dedup" in paths)]
    return found[0] if found else None


def compare(
    published: Published, task: str, metric: str, value: float, stderr: float | None
) -> Comparison | None:
    """How `value` +- `stderr` compares with what was published; None where nothing was.

    They agree within our standard error and half of the published figure's last digit. The caller
    sees to it that the score is zero-shot and of the whole task: nothing else is comparable.
    """
    figure = published.figures.get((task, metric))
    if figure is None:
        return None
    distance = abs(value - float(figure))
    rounding = 0.5 * 10.0 ** -len(figure.partition(".")[2])
    allowed = (stderr or 0.0) + rounding
    # 0.7655 - 0.765 is not quite 0.0005 in binary.
    agrees = distance <= allowed * (1 + 1e-9)
    return Comparison(figure, agrees, distance / stderr if stderr else None)


def _has_shape(config: NeoXConfig, model: Published) -> bool:
    return (
        (config.num_layers, config.hidden_size, config.num_attention_heads) == model.shape
        and config.shares_norm == model.shares_norm
        # What all of them have in common.
        and config.adapter is None  # which makes it another model
        and config.gpt_j_residual
        and config.no_weight_tying
        and (config.pos_emb, config.rotary_pct) == ("rotary", 0.25)
        and (config.norm, config.activation) == ("layernorm", "gelu")
        and config.kv_heads == config.num_attention_heads
        and config.ffn_size == 4 * config.hidden_size
    )


def _figures(acc: str, perplexity: str, piqa_acc: str, piqa_acc_norm: str | None) -> dict:
    figures = {
        ("lambada_openai", "acc"): acc,
        ("lambada_openai", "perplexity"): perplexity,
        ("piqa", "acc"): piqa_acc,
    }
    return figures if piqa_acc_norm is None else figures | {("piqa", "acc_norm"): piqa_acc_norm}


def _pythia(size: str, layers: int, hidden: int, heads: int, *figures: str) -> Published:
    """`size` is the name's end. The plain 1B is the one that was trained in bfloat16."""
    folder = f"pythia-{'1b-bf16' if size == '1b' else size}"
    source = f"github.com/EleutherAI/pythia, evals/pythia-v1/{folder}/zero-shot"
    return Published(f"pythia-{size}", (layers, hidden, heads), 143000, source, _figures(*figures))


MODELS = (
    Published(
        "GPT-NeoX-20B",
        (44, 6144, 64),
        150000,
        "GPT-NeoX's evaluate.py on the slim weights, blog.paperspace.com/gpt-neox-20-multi-gpu",
        _figures("0.7209", "3.672", "0.7742", "0.7807"),
    ),
    Published(
        "GPT-J-6B",
        (28, 4096, 16),
        383500,
        "github.com/kingoflolz/mesh-transformer-jax, README.md",
        _figures("0.697", "3.99", "0.765", None),
        shares_norm=True,
    ),
    _pythia("70m", 6, 512, 8, "0.1846", "142.429", "0.5947", "0.5914"),
    _pythia("70m-deduped", 6, 512, 8, "0.1915", "138.450", "0.5979", "0.5854"),
    _pythia("160m", 12, 768, 12, "0.3284", "38.065", "0.6273", "0.6164"),
    _pythia("160m-deduped", 12, 768, 12, "0.3417", "32.222", "0.6181", "0.6159"),
    _pythia("410m", 24, 1024, 16, "0.5162", "10.828", "0.6676", "0.6714"),
    _pythia("410m-deduped", 24, 1024, 16, "0.5244", "10.574", "0.6746", "0.6741"),
    _pythia("1b", 16, 2048, 8, "0.5620", "7.916", "0.7073", "0.6931"),
    _pythia("1b-deduped", 16, 2048, 8, "0.5804", "7.409", "0.7002", "0.7013"),
    _pythia("1.4b", 24, 2048, 16, "0.6161", "6.086", "0.7089", "0.7106"),
    _pythia("1.4b-deduped", 24, 2048, 16, "0.6187", "6.107", "0.7203", "0.7252"),
    _pythia("2.8b", 32, 2560, 32, "0.6472", "5.036", "0.7388", "0.7339"),
    _pythia("2.8b-deduped", 32, 2560, 32, "0.6515", "5.001", "0.7410", "0.7405"),
    _pythia("6.9b", 32, 4096, 32, "0.6728", "4.449", "0.7524", "0.7650"),
    _pythia("6.9b-deduped", 32, 4096, 32, "0.6889", "4.158", "0.7601", "0.7671"),
    _pythia("12b", 36, 5120, 40, "0.7046", "3.924", "0.7601", "0.7682"),
    _pythia("12b-deduped", 36, 5120, 40, "0.7097", "3.874", "0.7628", "0.7704"),
)
