"""adapter_config.json: what PEFT computes from the tensors beside it."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neox.config.hf import read_json
from neox.config.values import listed, show
from neox.errors import CheckpointError, ConfigError

# Keys that change nothing of what is computed from the tensors.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying"),
    *("eva_config", "inference_mode", "loftq_config", "lora_ga_config", "megatron_config"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("task_type", "velora_config"),
}
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "bias"),
    *("use_rslora", "modules_to_save", "target_modules", "exclude_modules", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern"),
}
_BIASES = ("none", "all", "lora_only")
# What A and B begin with; others begin by changing the base's weights, or compute otherwise.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Settings:
    """The keys that tell what the tensors mean; modules are called as in transformers."""

    path: Path
    rank: int
    alpha: float
    dropout: float
    bias: str
    use_rslora: bool
    rank_pattern: Mapping[str, int] = field(repr=False)
    alpha_pattern: Mapping[str, float] = field(repr=False)
    modules_to_save: list[str] = field(repr=False)
    body: Mapping[str, Any] = field(repr=False)

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def saves(self, module: str) -> bool:
        """Whether a module was trained whole."""
        return any(module.endswith(name) for name in self.modules_to_save)

    def targets(self, module: str) -> bool:
        """Whether a matrix has to have an adapter; no where target_modules does not say."""
        wanted, excluded = self.body.get("target_modules"), self.body.get("exclude_modules")
        if not wanted or _names(excluded, module) or self.saves(module):
            return False
        if isinstance(wanted, str):
            return wanted != "all-linear" and _names(wanted, module)
        return _names(wanted, module) and self._transforms(module)

    def _transforms(self, module: str) -> bool:
        indices = self.body.get("layers_to_transform")
        if indices is None or indices == []:
            return True
        found = re.search(r"\.(\d+)\.", module)
        return found is not None and int(found[1]) in (
            indices if isinstance(indices, list) else [indices]
        )


def read_settings(path: Path) -> Settings:
    """Raises CheckpointError, also for what would be computed otherwise than by LoRA."""
    try:
        body = read_json(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if problem := next(_refusals(body), None) or next(_misfits(body), None):
        raise CheckpointError(f"{path}: {problem}")
    return Settings(
        path,
        body["r"],
        body["lora_alpha"],
        body.get("lora_dropout") or 0.0,
        body.get("bias") or "none",
        bool(body.get("use_rslora")),
        body.get("rank_pattern") or {},
        body.get("alpha_pattern") or {},
        body.get("modules_to_save") or [],
        body,
    )


def _refusals(body: Mapping[str, Any]) -> Iterator[str]:
    kind = body.get("peft_type")
    if kind != "LORA":
        yield f"peft_type is {show(kind)}, which is not supported. Only LORA is."
    if body.get("use_dora"):
        yield (
            "use_dora is true, which is not supported: DoRA scales each row of the weights as "
            "well. Merge it into its base with PEFT."
        )
    if body.get("fan_in_fan_out"):
        yield "fan_in_fan_out is true, which is for weights of [in, out]; this model has none."
    start = body.get("init_lora_weights")
    if start not in _STARTS:
        yield (
            f"init_lora_weights is {show(start)}, which changes the base's weights, too: without "
            "those the adapters mean nothing. Have PEFT convert them to LoRA "
            "(path_initial_model_for_weight_conversion)."
        )
    for name, value in body.items():
        if value and name not in _HARMLESS | _READ:
            yield f"{name} is {show(value)}, which is not supported. Only plain LoRA is."


def _misfits(body: Mapping[str, Any]) -> Iterator[str]:
    """Values that are none of LoRA's."""
    if not _is_rank(body.get("r")):
        yield f"r is {show(body.get('r'))}, but it must be an integer of 1 or more."
    if not _is_number(body.get("lora_alpha")):
        yield f"lora_alpha is {show(body.get('lora_alpha'))}, but it must be a number."
    dropout = body.get("lora_dropout") or 0.0
    if not _is_number(dropout) or not 0 <= dropout <= 1:
        yield f"lora_dropout is {show(dropout)}, but it must be from 0 to 1."
    if (body.get("bias") or "none") not in _BIASES:
        yield f"bias is {show(body['bias'])}, but it must be {listed(_BIASES)}."
    for name, fits, what in (
        ("rank_pattern", _is_rank, "integers of 1 or more"),
        ("alpha_pattern", _is_number, "numbers"),
    ):
        given = body.get(name) or {}
        if not isinstance(given, dict) or not all(map(fits, given.values())):
            yield f"{name} is {show(given)}, but it must be {what} by modules' names."
        elif bad := next((text for text in given if not _is_pattern(text)), None):
            yield f"{name} has {show(bad)}, which is no regular expression."
    saved = body.get("modules_to_save") or []
    if not _are_names(saved):
        yield f"modules_to_save is {show(saved)}, but it must be a list of names."
    for name in ("target_modules", "exclude_modules"):
        given = body.get(name) or []
        if not _are_names(given) and not (isinstance(given, str) and _is_pattern(given)):
            yield (
                f"{name} is {show(given)}, but it must be a list of names, or a regular expression."
            )
    indices = body.get("layers_to_transform")
    if not all(isinstance(at, int) for at in (indices if isinstance(indices, list) else [])):
        yield f"layers_to_transform is {show(indices)}, but it must be a list of integers."


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches, as PEFT has it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _names(given: list[str] | str | None, module: str) -> bool:
    if isinstance(given, str):
        return re.fullmatch(given, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in given or ())


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -sys.float_info.max <= value <= sys.float_info.max  # false for NaN
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
