"""Generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neox.config.fields import key, refused

_PRECOMPUTE = "precomputed reference log-probabilities are not supported"


@dataclass(frozen=True, kw_only=True)
class TextGenConfig:
    """What generate.py writes."""

    text_gen_type: Literal["unconditional", "input-file", "interactive", "precompute"] = key(
        "unconditional",
        "Where prompts come from; input-file when only sample_input_file is given.",
        refused={"precompute": _PRECOMPUTE},
    )
    temperature: float = key(0.0, "Sampling temperature; all of 0, 0, 0 is greedy.", low=0)
    top_p: float = key(0.0, "Sample from the likeliest tokens of this total.", low=0, high=1)
    top_k: int = key(0, "Sample from this many likeliest tokens.", low=0)
    maximum_tokens: int = key(64, "Tokens to generate for a prompt.", low=1)
    generate_batch_size: int = key(16, "Prompts to complete at the same time.", low=1)
    num_samples: int = key(1, "Samples of an unconditional run.", low=1)
    prompt_end: str = key("\n", "What separates the prompts of a file.")
    sample_input_file: str | None = key(None, "The prompts.")
    sample_output_file: str | None = key("samples.txt", "Where the samples go, as JSON Lines.")
    return_logits: bool = key(False, "Write each token's logits too.")
    recompute: bool = key(False, "Generate without the key/value cache.")
    compile_decoding: bool | None = key(
        None,
        "Decode by a pass that is put together once, by the project's own kernels on a CPU, by "
        "torch.compile and CUDA graphs on a GPU; false: operation by operation; null: on CPUs.",
    )
    precompute_model_name: str | None = refused(None, "Name of the reference model.", _PRECOMPUTE)
