"""What adapters and 8-bit weights need of the other keys."""

from __future__ import annotations

import difflib

from neox.config.checks import Checks, Findings
from neox.config.config import NeoXConfig
from neox.config.frozen import ALL_LINEAR, TARGETS
from neox.config.values import listed, show

CHECKS = Checks()


@CHECKS.reading("lora", "no_weight_tying")
def _targets_are_there(config: NeoXConfig) -> Findings:
    if config.lora is None:
        return
    given = config.lora_values["targets"]
    names = [given] if isinstance(given, str) else given
    if not names:
        yield "lora.targets", f"lora.targets is empty. Use {ALL_LINEAR}, or some of its matrices."
    for name in names:
        if name in ("q_proj", "k_proj", "v_proj"):
            yield (
                "lora.targets",
                f"lora.targets has {name}, but queries, keys and values are made by one matrix "
                "here. Use query_key_value.",
            )
        elif name not in (*TARGETS, ALL_LINEAR):
            near = difflib.get_close_matches(name, [*TARGETS, ALL_LINEAR], 1)
            meant = f" Did you mean {near[0]}?" if near else ""
            yield (
                "lora.targets",
                f"lora.targets has {show(name)}, which is no matrix of the model.{meant} Use "
                f"{listed([ALL_LINEAR, *list(TARGETS)[:5]])}.",
            )
        elif TARGETS.get(name) == "final_linear" and not config.no_weight_tying:
            yield (
                "lora.targets",
                f"lora.targets has {name}, but the output projection is the embedding "
                "(no_weight_tying: false). Leave it out.",
            )


@CHECKS.reading("lora", "load", purposes=("train",))
def _adapters_have_a_base(config: NeoXConfig) -> Findings:
    if config.lora is not None and config.load is None:
        yield (
            "lora",
            "lora trains adapters of a model that is there, but load is missing. Name the folder "
            "of the checkpoint that they are for.",
        )


@CHECKS.reading("adapter", "lora", purposes=("train",))
def _adapters_are_trained(config: NeoXConfig) -> Findings:
    if config.adapter is not None and config.lora is None:
        yield (
            "adapter",
            f"adapter is {show(config.adapter)}, but without lora the whole model would be "
            "trained. Give lora, with the rank and the targets that the adapters have.",
        )


@CHECKS.reading("load_in_8bit", "lora", purposes=("train",))
def _eight_bits_are_frozen(config: NeoXConfig) -> Findings:
    if config.load_in_8bit and config.lora is None:
        yield (
            "load_in_8bit",
            "load_in_8bit is true, but 8-bit weights cannot be trained. Give lora as well, which "
            "trains adapters beside them, or drop it.",
        )


@CHECKS.reading("lora", "zero_optimization", purposes=("train", "plan"))
def _frozen_weights_are_whole(config: NeoXConfig) -> Findings:
    if config.lora is not None and config.zero_stage == 3:
        yield (
            "zero_optimization.stage",
            "zero_optimization.stage is 3, which shards the weights that are trained; lora trains "
            "few. Use stage 0, 1 or 2, and load_in_8bit: true if the frozen ones are too large.",
        )


@CHECKS.reading("quantize", "load_in_8bit")
def _one_way_of_few_bits(config: NeoXConfig) -> Findings:
    if config.quantize != "none" and config.load_in_8bit:
        yield (
            "quantize",
            f"quantize is {config.quantize} and load_in_8bit is true: a weight is held in one way. "
            "Use quantize to generate and evaluate, load_in_8bit to train adapters.",
        )


@CHECKS.reading("quantize", purposes=("train",))
def _training_is_not_quantized(config: NeoXConfig) -> Findings:
    if config.quantize != "none":
        yield (
            "quantize",
            f"quantize is {config.quantize}, but quantized weights cannot be trained. Drop it; to "
            "train adapters of a model in 8 bits, use load_in_8bit and lora.",
        )
