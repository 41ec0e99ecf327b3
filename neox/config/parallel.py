"""How the model is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass

from neox.config.fields import derived, key


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism. The number of replicas follows: world_size / (tensor x pipeline).
    Generation and evaluation replace sizes that need more devices than there are."""

    pipe_parallel_size: int = key(
        0, "Pipeline stages; 0 trains without the pipeline engine, 1 with it.", low=0
    )
    model_parallel_size: int = key(1, "Processes that share every layer's weights.", low=1)
    pipe_partition_method: str = key(
        "type:transformer|mlp",
        "What is balanced over stages: type:REGEX of layer names, parameters or uniform.",
    )
    sequence_parallel: bool = key(
        False,
        "Split activations between layers along the sequence, between tensor-parallel processes, "
        "to train.",
    )
    world_size: int = derived(1, "Processes of the run.", "the launcher counts the processes")
    is_pipe_parallel: bool = derived(
        False, "Whether the pipeline engine trains.", "pipe_parallel_size sets it"
    )
