"""LoRA adapters in the file format of the PEFT library.

adapters   Adapters, a rank's shards of them, where they are
names      what PEFT calls our matrices, and their rows there
settings   what an adapter_config.json says
joining    parts of our tensors put together again
reading    a folder to Adapters, or one message why not
writing    Adapters to a folder
merging    a checkpoint whose weights have the adapters in them
"""

from neox.checkpoint.peft.adapters import Adapters, fill, find_adapter
from neox.checkpoint.peft.merging import merged, with_adapter
from neox.checkpoint.peft.reading import read_adapters
from neox.checkpoint.peft.writing import write_adapters

__all__ = [
    "Adapters",
    "fill",
    "find_adapter",
    "merged",
    "read_adapters",
    "with_adapter",
    "write_adapters",
]
