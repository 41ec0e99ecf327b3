"""Adapters for tests: made by PEFT on our exports, or random ones of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox.checkpoint.hf.export import export
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.peft import Adapters, fill
from neox.config import NeoXConfig
from neox.model.frozen import Frozen
from neox.model.gpt import Layer, build_layers, layers
from neox.model.lora import AdapterSpec
from neox.parallel.groups import ProcessGroups
from tests.models import ARCHITECTURES, VOCAB, config_of, forward, write_model

NEOX: dict[str, Any] = {}
GPT_J = ARCHITECTURES["gpt_j"]
MATRICES = ("attention.query_key_value", "attention.dense", "mlp.linear1", "mlp.linear2")


def base(folder: Path, **values: Any) -> tuple[Checkpoint, NeoXConfig]:
    """A checkpoint with its export in `folder`/hf."""
    write_model(folder / "neox", 1, **values)
    checkpoint, config = Checkpoint.open(folder / "neox"), config_of(**values)
    export(checkpoint, config, folder / "hf")
    return checkpoint, config


def their_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)


def make(
    folder: Path, *, safe: bool = True, embeddings: bool | str = "auto", **settings: Any
) -> Path:
    """PEFT's adapter of the export in `folder`, whose trained numbers are all random.

    `embeddings` says whether copies of the base's are put beside it.
    """
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(their_model(folder), LoraConfig(**{"r": 4, **settings}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(
        folder / "adapter", safe_serialization=safe, save_embedding_layers=embeddings
    )
    return folder / "adapter"


def their_logits(folder: Path, adapter: Path, ids: Tensor) -> Tensor:
    from peft import PeftModel

    with torch.inference_mode():
        logits: Tensor = PeftModel.from_pretrained(their_model(folder), adapter)(ids).logits
    return logits


def random_adapters(
    config: NeoXConfig,
    matrices: tuple[str, ...] = MATRICES,
    *,
    head: bool = False,
    biases: bool = False,
    norms: bool = False,
    rank: int = 2,
    alpha: float = 2,
) -> Adapters:
    """Of ranks that differ by matrix, from `rank` on, everything off zero."""
    depth = config.num_layers
    specs = {
        (index, name): AdapterSpec(rank + number, alpha / (rank + number))
        for index in range(2, depth + 2)
        for number, name in enumerate(matrices)
    }
    if head:
        specs[depth + 4, "final_linear"] = AdapterSpec(5, 0.7)
    frozen = Frozen(torch.float32, ProcessGroups.single(), specs=specs, biases=biases, norms=norms)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        (layer.index, name): torch.randn(layout.shape, generator=generator) * 0.2
        for layer in model(config, frozen, ProcessGroups.single())
        for name, layout in layer.trained.items()
    }
    return Adapters(specs, tensors)


def model(config: NeoXConfig, frozen: Frozen | None, groups: ProcessGroups) -> list[Layer]:
    return layers(config, VOCAB, torch.float32, groups, frozen=frozen)


def our_logits(
    checkpoint: Checkpoint,
    config: NeoXConfig,
    adapters: Adapters | None,
    ids: Tensor,
    groups: ProcessGroups | None = None,
) -> Tensor:
    """This rank's logits of the vocabulary."""
    groups = groups or ProcessGroups.single()
    specs = adapters.specs if adapters else {}

    def load(module: Any, layer: Layer) -> None:
        # Before it has adapters' values: a checkpoint fills what is the base's.
        checkpoint.load_into(module, layer, groups)
        if adapters:
            fill(module, layer, adapters, groups)

    frozen = Frozen(torch.float32, groups, specs=specs)
    with torch.inference_mode():
        return forward(build_layers(model(config, frozen, groups), load), ids)
