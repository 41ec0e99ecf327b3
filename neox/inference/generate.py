"""The decoding loop: tokens from a model one after another, and a prompt's whole completion."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neox.config import ModelConfig, NeoXConfig
from neox.errors import CheckpointError
from neox.inference.sampling import Sampling, choose, prompt_generator
from neox.inference.stages import InferenceModel
from neox.tokenizer import Tokenizer

NOT_STARTED = "WARNING: text generation did not start; try different batching or adjust parameters"


class Step(NamedTuple):
    token: int
    logits_V: Tensor | None  # fp32, what the token was chosen from; on the last stage only


@torch.inference_mode()
def generate(
    model: InferenceModel,
    prompt: Sequence[int],
    *,
    maximum_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    eod: int,
    vocabulary: int,
    recompute: bool = False,
) -> Iterator[Step]:
    """Yield the tokens that follow `prompt`, one a forward pass, until `eod` (yielded last).

    At most `maximum_tokens` come, and prompt and tokens together need to fit seq_length (`room`).
    Collective over the ranks of one replica: they iterate in step and see the same tokens, and may
    all stop early at the same token. The last stage chooses; `generator` matters there only.
    vocabulary: the tokenizer's tokens. The padded vocabulary has rows beyond, which stand for no
    token and are never chosen.
    recompute: run the whole sequence again for every token instead of keeping a cache.
    """
    assert prompt, "a prompt has at least one token"
    assert maximum_tokens <= room(model.config, prompt), "more tokens asked for than there is room"
    sequence = list(prompt)
    new = sequence
    cache = None if recompute else model.new_cache(1, len(prompt) + maximum_tokens)
    for _ in range(maximum_tokens):
        logits_BSV = model(torch.tensor([new], device=model.device), cache, last_only=True)
        token_B = torch.zeros(1, dtype=torch.int64, device=model.device)
        logits_V = None
        if logits_BSV is not None:
            logits_BV = _finite(logits_BSV[:, -1], len(sequence))
            token_B = choose(logits_BV[:, :vocabulary], sampling, generator)
            logits_V = logits_BV[0]
        token = int(model.broadcast(token_B))
        yield Step(token, logits_V)
        if token == eod:
            return
        sequence.append(token)
        new = sequence if recompute else [token]


def _finite(logits_BV: Tensor, length: int) -> Tensor:
    if not logits_BV.isfinite().all():
        raise CheckpointError(
            f"the model's logits after {length} tokens are not finite numbers: the checkpoint is "
            "damaged, or its activations overflow this precision; try `precision: fp32`"
        )
    return logits_BV


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The prompt the model sees: the text's tokens, or the end-of-document token when empty."""
    return tokenizer.tokenize(text) or [tokenizer.eod]


def room(config: ModelConfig, prompt: Sequence[int]) -> int:
    """How many tokens fit after `prompt`; negative when the prompt itself does not fit."""
    return config.seq_length - len(prompt)


def no_room(config: ModelConfig, prompt: Sequence[int]) -> str | None:
    """Why nothing can be generated after `prompt`; None when there is room."""
    if room(config, prompt) > 0:
        return None
    return (
        f"the prompt has {len(prompt)} tokens, and the model's seq_length of {config.seq_length} "
        f"leaves no room to generate; shorten it to at most {config.seq_length - 1} tokens"
    )


def continuation(
    model: InferenceModel,
    tokenizer: Tokenizer,
    config: NeoXConfig,
    prompt: Sequence[int],
    index: int,
) -> Iterator[Step]:
    """`generate` as the configuration says; `index` numbers the prompt, for its random stream."""
    return generate(
        model,
        prompt,
        maximum_tokens=min(config.maximum_tokens, room(config, prompt)),
        sampling=Sampling.of(config),
        generator=prompt_generator(config.seed, index),
        eod=tokenizer.eod,
        vocabulary=tokenizer.vocab_size,
        recompute=config.recompute,
    )


def complete(
    model: InferenceModel,
    tokenizer: Tokenizer,
    config: NeoXConfig,
    context: str,
    index: int,
    on_token: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Generate after `context` and return the result that files hold, the same on every rank.

    length: tokens generated, without the end-of-document token that sets `finished`.
    text: their text; None when there are none.
    message: None, or why the result is not what was asked for.
    logits: only with return_logits. maximum_tokens rows of the padded vocabulary's size: the fp32
    logits that each token was chosen from, zeros for tokens never generated.
    Collective over the ranks of one replica.
    """
    start = time.perf_counter()
    prompt = encode(tokenizer, context)
    tokens: list[int] = []
    rows: list[Tensor | None] = []
    finished = False
    problem = no_room(config, prompt)
    if problem is None:
        for token, logits_V in continuation(model, tokenizer, config, prompt, index):
            on_token()
            rows.append(logits_V)
            finished = token == tokenizer.eod
            if not finished:
                tokens.append(token)

    message = None
    if problem is not None:
        message = f"WARNING: {problem}"
    elif not tokens:
        message = NOT_STARTED
    result: dict[str, Any] = {
        "context": context,
        "text": tokenizer.detokenize(tokens) if tokens else None,
        "length": len(tokens),
        "finished": finished,
        "message": message,
        "duration_seconds": time.perf_counter() - start,
    }
    if config.return_logits:
        result["logits"] = _shared_logits(model, rows, config.maximum_tokens)
    return result


def _shared_logits(
    model: InferenceModel, rows: list[Tensor | None], count: int
) -> list[list[float]]:
    """`count` rows of logits on every rank; the last stage alone holds them so far."""
    logits_TV = torch.zeros(count, model.padded_vocab_size, device=model.device)
    held = [row for row in rows if row is not None]
    if held:
        logits_TV[: len(held)] = torch.stack(held)
    return model.broadcast(logits_TV).tolist()
