"""Programs that generate, each as a contestant: ours and its peers, with the same model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import peer_models
from benchmarks.contestants import THREADS
from benchmarks.peer_models import Shape

if TYPE_CHECKING:
    import torch

PROMPT, NEW, BATCH = 128, 64, 16


@dataclass(frozen=True)
class Generation:
    """What a turn did."""

    first: float  # seconds until every prompt had its first token
    rest: float  # seconds from there on
    count: int  # tokens of that time
    tokens: list[list[int]]  # the new ones, of each prompt

    @property
    def prefill(self) -> float:
        """Prompt tokens per second."""
        return len(self.tokens) * PROMPT / self.first

    @property
    def decode(self) -> float:
        """New tokens per second, once every prompt is read."""
        return self.count / self.rest

    @property
    def total(self) -> float:
        """New tokens per second, the time for the prompts included."""
        return sum(len(tokens) for tokens in self.tokens) / (self.first + self.rest)


Prompts = Sequence[Sequence[int]]
Generate = Callable[[Prompts], Generation]


class Clock:
    """The tokens of one prompt and their times, told as they come."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._times = [time.perf_counter()]

    def tell(self, token: int) -> None:
        self.tokens.append(token)
        self._times.append(time.perf_counter())

    def generation(self) -> Generation:
        assert len(self.tokens) == NEW, f"{len(self.tokens)} tokens came, not {NEW}"
        start, first, *_, last = self._times
        return Generation(first - start, last - first, NEW - 1, [self.tokens])


def ours(shape: Shape, folder: Path, precision: str) -> Generate:
    from neox.config import from_dict
    from neox.inference.decoder import Decoder
    from neox.inference.load import load_model
    from neox.inference.request import Request
    from neox.parallel.groups import ProcessGroups
    from neox.tokenizer import build_tokenizer

    values = peer_models.values(shape, folder)
    if precision != "fp32":
        values |= {"quantize": precision}
    config = from_dict(values)
    model, tokenizer = load_model(config, ProcessGroups.single()), build_tokenizer(config)
    decoders = {rows: Decoder(model, tokenizer, rows, PROMPT + NEW) for rows in (1, BATCH)}

    def turn(prompts: Prompts) -> Generation:
        decoder = decoders[len(prompts)]
        started = time.perf_counter()
        tokens: dict[int, list[int]] = {}
        for prompt in prompts:
            request = Request(tuple(prompt), maximum_tokens=NEW, ignore_eod=True)
            tokens[decoder.submit(request)] = []
        first, early = 0.0, 0
        while not decoder.idle:
            for progress in decoder.step():
                tokens[progress.id] += progress.tokens
            if not first and all(tokens.values()):
                first = time.perf_counter() - started
                early = sum(len(row) for row in tokens.values())
        rest = time.perf_counter() - started - first
        count = sum(len(row) for row in tokens.values()) - early
        return Generation(first, rest, count, list(tokens.values()))

    return turn


def transformers(shape: Shape, folder: Path, precision: str) -> Generate:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    path = peer_models.transformers_of(folder)
    model = transformers.GPTNeoXForCausalLM.from_pretrained(path, local_files_only=True)
    model.generation_config.eos_token_id = None

    class Streamer:
        """Told the prompt, then each token."""

        def __init__(self) -> None:
            self.clock = Clock()
            self._prompted = False

        def put(self, tokens: torch.Tensor) -> None:
            if self._prompted:
                self.clock.tell(int(tokens))
            self._prompted = True

        def end(self) -> None:
            pass

    def turn(prompts: Prompts) -> Generation:
        tokens = torch.tensor(prompts)
        streamer = Streamer()
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW,
            do_sample=False,
            streamer=streamer,
        )
        return streamer.clock.generation()

    return turn


def ctranslate2(shape: Shape, folder: Path, precision: str) -> Generate:
    import torch

    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        os.environ["CT2_FORCE_CPU_ISA"] = "AVX512"  # on AMD's processors it would take AVX2
    import ctranslate2

    generator = ctranslate2.Generator(
        str(peer_models.ctranslate2_of(folder, precision)),
        compute_type={"fp32": "float32", "int8": "int8"}[precision],
        intra_threads=THREADS,
    )
    names = peer_models.vocabulary(folder)

    def turn(prompts: Prompts) -> Generation:
        start = [[names[token] for token in prompt] for prompt in prompts]
        clock = Clock()
        generator.generate_batch(
            start,
            max_length=NEW,
            min_length=NEW,
            include_prompt_in_result=False,  # so the prompt is read at once
            callback=lambda step: clock.tell(step.token_id),  # None, that is: go on
        )
        return clock.generation()

    return turn


def llama_cpp(shape: Shape, folder: Path, precision: str) -> Generate:
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        str(peer_models.gguf_of(folder, precision)),
        n_ctx=PROMPT + NEW,
        n_threads=THREADS,
        n_threads_batch=THREADS,
        verbose=False,
    )

    def turn(prompts: Prompts) -> Generation:
        model.reset()
        clock = Clock()
        new = prompts[0]
        for _ in range(NEW):
            model.eval(new)
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            token = int(np.ctypeslib.as_array(logits, (shape.vocabulary,)).argmax())
            clock.tell(token)
            new = [token]
        return clock.generation()

    return turn


@dataclass(frozen=True)
class Contestant:
    """A program that generates, and what it needs."""

    build: Callable[[Shape, Path, str], Generate]
    precision: str
    module: str


CONTESTANTS = {
    "ours fp32": Contestant(ours, "fp32", "neox"),
    "transformers fp32": Contestant(transformers, "fp32", "transformers"),
    "CTranslate2 fp32": Contestant(ctranslate2, "fp32", "ctranslate2"),
    "llama.cpp fp32": Contestant(llama_cpp, "fp32", "llama_cpp"),
    "ours int8": Contestant(ours, "int8", "neox"),
    "CTranslate2 int8": Contestant(ctranslate2, "int8", "ctranslate2"),
    "llama.cpp int8": Contestant(llama_cpp, "int8", "llama_cpp"),
    "ours int4": Contestant(ours, "int4", "neox"),
    "llama.cpp int4": Contestant(llama_cpp, "int4", "llama_cpp"),
}
