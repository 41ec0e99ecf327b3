"""TextGenConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from neox.config.fields import REQUIRED, key


@dataclass(frozen=True, kw_only=True)
class TextGenConfig:
    text_gen_type: str | None = key(None, "")
    precompute_model_name: str | None = key(None, "")
    temperature: float = key(0.0, "")
    top_p: float = key(0.0, "")
    top_k: int = key(0, "")
    return_logits: bool = key(False, "")
    maximum_tokens: int = key(64, "")
    prompt_end: str = key("\n", "")
    sample_input_file: str | None = key(None, "")
    sample_output_file: str = key("samples.txt", "")
    num_samples: int = key(1, "")
    recompute: bool = key(False, "")
    eval_results_prefix: str = key("", "")
    eval_tasks: list | None = key(None, "")
