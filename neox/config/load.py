from __future__ import annotations
from typing import Any
from neox.config.config import NeoXConfig
from neox.errors import ConfigError
from collections.abc import Mapping, Sequence
from pathlib import Path
import dataclasses
import yaml


@dataclasses.dataclass(frozen=True)
class Override:
    value: Any
    origin: str


def _build(v: dict, origins: dict, world_size: int | None, files: dict) -> NeoXConfig:
    v = dict(v)
    names = {f.name for f in dataclasses.fields(NeoXConfig)}
    for k in v:
        if k not in names:
            raise ConfigError(f"unknown key {k}")
    for k in (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "seq_length",
        "max_position_embeddings",
    ):
        if k not in v:
            raise ConfigError(f"{k} is missing")
    tp, pp = v.get("model_parallel_size", 1), max(1, v.get("pipe_parallel_size", 0))
    v["world_size"] = (
        world_size or (v.get("num_gpus") or 0) * max(1, v.get("num_nodes", 1)) or tp * pp
    )
    dp = v["world_size"] // (tp * pp)
    tb, mb, ga = (
        v.get("train_batch_size"),
        v.get("train_micro_batch_size_per_gpu"),
        v.get("gradient_accumulation_steps"),
    )
    if mb is None:
        mb = tb // (dp * (ga or 1)) if tb else 1
    if ga is None:
        ga = tb // (dp * mb) if tb else 1
    v.update(
        train_batch_size=tb or mb * ga * dp,
        train_micro_batch_size_per_gpu=mb,
        gradient_accumulation_steps=ga,
    )
    opt = v.get("optimizer") or {}
    v["optimizer_type"] = {"adamw": "adam"}.get(
        opt.get("type", "adam").lower(), opt.get("type", "adam").lower()
    )
    v["lr"] = (opt.get("params") or {}).get("lr", v.get("lr", 0.001))
    v["zero_stage"] = (v.get("zero_optimization") or {}).get("stage", 0)
    if "precision" not in v:
        if (v.get("fp16") or {}).get("enabled"):
            v["precision"] = "bfloat16" if v["fp16"].get("type") == "bfloat16" else "fp16"
        elif (v.get("bf16") or {}).get("enabled"):
            v["precision"] = "bfloat16"
        else:
            v["precision"] = "fp32"
    v["is_pipe_parallel"] = v.get("pipe_parallel_size", 0) >= 1
    if v.get("text_gen_type") is None:
        v["text_gen_type"] = "input-file" if v.get("sample_input_file") else "unconditional"
    v["config_files"] = files
    return NeoXConfig(**v, origins=origins)


def from_dict(values: Mapping[str, Any], *, world_size: int = 1) -> NeoXConfig:
    return _build(dict(values), {}, world_size, {})


def load_config(
    files: Sequence[Path],
    overrides: Mapping[str, Override] | None = None,
    *,
    purpose: str | None = None,
    world_size: int | None = None,
    check_files: bool = True,
) -> NeoXConfig:
    values: dict = {}
    origins: dict = {}
    texts: dict = {}
    for f in files:
        text = Path(f).read_text()
        texts[Path(f).name] = text
        for k, v in yaml.safe_load(text).items():
            values[k.replace("-", "_")] = v
            origins[k.replace("-", "_")] = f"{Path(f).name}:1"
    for k, o in (overrides or {}).items():
        values[k] = o.value
        origins[k] = o.origin
    return _build(values, origins, world_size, texts)
