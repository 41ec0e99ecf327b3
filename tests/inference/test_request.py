"""Requests that cannot be served are refused, in one sentence each."""

from __future__ import annotations

import math
from typing import Any

import pytest

from neox.errors import RequestError
from neox.inference.request import Request, check
from neox.inference.sampling import Sampling


@pytest.mark.parametrize(
    "values, message",
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (1, 100)}, "holds the token 100, but tokens are 0 to 99"),
        ({"prompt": (1, -1)}, "holds the token -1"),
        ({"prompt": (1,) * 32}, "the prompt has 32 tokens, and .* seq_length of 32"),
        ({"maximum_tokens": 0}, "maximum_tokens is 0: set 1 or more"),
        ({"minimum_tokens": 5}, "minimum_tokens is 5: set 0 to maximum_tokens, 4"),
        ({"minimum_tokens": -1}, "minimum_tokens is -1"),
        ({"sampling": Sampling(-0.1)}, "temperature is -0.1"),
        ({"sampling": Sampling(math.nan)}, "temperature is nan"),
        ({"sampling": Sampling(math.inf)}, "temperature is inf"),
        ({"sampling": Sampling(top_k=-1)}, "top_k is -1"),
        ({"sampling": Sampling(top_p=1.1)}, "top_p is 1.1"),
        ({"sampling": Sampling(top_p=math.nan)}, "top_p is nan"),
        ({"sampling": Sampling(repetition_penalty=0.0)}, "repetition_penalty is 0.0.*0.01 to 100"),
        ({"sampling": Sampling(repetition_penalty=math.nan)}, "repetition_penalty is nan"),
        ({"ends": (100,)}, "the token 100 is to end the answer, but tokens are 0 to 99"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": 101}, "logprobs is 101: set 0 to 100"),
    ],
)
def test_what_cannot_be_served_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check(Request(**{"prompt": (1, 2), "maximum_tokens": 4} | values), 100, 32)


def test_what_can_be_served_is_not() -> None:
    check(Request((0, 99) * 15 + (7,), 500, 500, Sampling(0.1, 9, 1.0, 1.2)), 100, 32)
    check(Request((5,), 1, stop=("\n",), logprobs=0, seed=-(2**70)), 100, 32)
