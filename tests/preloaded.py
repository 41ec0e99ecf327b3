"""What the process that ranks are forked from has imported; see tests/world.py.

Each rank saves seconds by it. Nothing is computed here: a rank gets modules as they are when new.
"""

import gc

import deepspeed  # noqa: F401
import lm_eval.api.task  # noqa: F401
import megatron.core.parallel_state
import megatron.core.tensor_parallel  # noqa: F401
import pytest  # noqa: F401
import torch.distributed  # noqa: F401
import transformers  # noqa: F401

import neox.entrypoints.evaluate
import neox.entrypoints.generate
import neox.entrypoints.train  # noqa: F401

# Ranks collect their own garbage only: to look through half a million objects of libraries takes
# 0.3 s each time, and writes to memory that is shared until then.
gc.collect()
gc.freeze()
