"""Completions into a file: of a file's prompts, or without one."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from neox import log
from neox.config import NeoXConfig
from neox.errors import ConfigError, DataError, NeoXError
from neox.inference.generate import completions
from neox.inference.stages import InferenceModel
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """Prompts to complete and the JSON Lines file their results go to."""

    prompts: list[str]
    output: Path


def prepare(config: NeoXConfig, groups: ProcessGroups) -> Job:
    """The job of the modes `unconditional` and `input-file`. Collective over the world.

    Meant to come before the weights are loaded: raises DataError when the prompts cannot be read
    or the results cannot be written.
    """
    return _from_rank_0(lambda: _job(config), groups)


def _job(config: NeoXConfig) -> Job:
    output = Path(config.sample_output_file or "samples.txt")
    if config.text_gen_type == "unconditional":
        prompts = [""] * config.num_samples
    else:
        assert config.sample_input_file is not None, "checked with the configuration"
        source = Path(config.sample_input_file)
        prompts = read_prompts(source, config.prompt_end)
        if config.sample_output_file is None or config.origin("sample_output_file") == "default":
            output = source.with_name(f"{source.name}.output.jsonl")
        if output.exists() and output.samefile(source):
            raise ConfigError(f"{output} holds the prompts: name another file for the results")
    _check_writable(output)
    return Job(prompts, output)


def read_prompts(path: Path, prompt_end: str) -> list[str]:
    """The prompts of a UTF-8 file, separated by `prompt_end`; blank ones are left out.

    A prompt loses the blank lines before it and all white space after it, but its first line keeps
    its indentation, which means something in code. Any kind of line end reads as a newline.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read the prompts in {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"cannot read the prompts in {path}: byte {error.start} is not UTF-8 text; save the "
            "file as UTF-8"
        ) from error
    prompts = [re.sub(r"\A\s*\n", "", part).rstrip() for part in text.split(prompt_end)]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise DataError(f"there are no prompts in {path}")
    return prompts


def _check_writable(path: Path) -> None:
    """Refuse a place that cannot be written; leaves what is there as it is."""
    reason = None
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "permission denied"
    if reason is not None:
        raise _cannot_write(path, reason)


def _cannot_write(path: Path, reason: str | None) -> DataError:
    return DataError(
        f"cannot write the results to {path}: {reason}; name another file with -o FILE or "
        "`sample_output_file`"
    )


def write_completions(
    model: InferenceModel, tokenizer: Tokenizer, config: NeoXConfig, job: Job
) -> None:
    """Complete every prompt; write one JSON object a line, in the order of the prompts.

    Each line is written as soon as it and those before it are there, so whatever stops the run,
    these results are in the file. Rank 0 writes. Replica r takes the prompts r, r + dp, ...
    Collective over the world. Raises DataError when the file cannot be written, say on a full disk.
    """
    try:
        _write_completions(model, tokenizer, config, job)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _cannot_write(job.output, error.strerror) from error
    count = len(job.prompts)
    log.info(f"{count} result{'s' if count > 1 else ''} in {job.output}")


def _write_completions(
    model: InferenceModel, tokenizer: Tokenizer, config: NeoXConfig, job: Job
) -> None:
    groups = model.groups
    count = len(job.prompts)
    own = [(i, job.prompts[i]) for i in range(groups.dp_rank, count, groups.dp)]
    opened: Any = contextlib.nullcontext()
    if groups.rank == 0:
        opened = job.output.open("w", encoding="utf-8")
    total = len(own) * config.maximum_tokens
    progress = log.progress(total=total, desc="Generating", unit="token")
    with opened as file, progress as bar:
        results = completions(model, tokenizer, config, own, bar.update)
        for first in range(0, count, groups.dp):
            bar.set_description(f"Generating, prompt {first + 1} of {count}")
            own_result = next(results, None)  # none on a replica whose prompts are done
            for number, result in enumerate(_gather(own_result, groups), start=first + 1):
                file.write(json.dumps(result) + "\n")
                file.flush()
                if result["message"] is not None:
                    log.warning(f"prompt {number}: {result['message'].removeprefix('WARNING: ')}")


def _gather(result: dict[str, Any] | None, groups: ProcessGroups) -> list[dict[str, Any]]:
    """On rank 0 the results of all replicas that have one, in order; elsewhere nothing."""
    results = [result]
    if groups.dp > 1 and groups.tp_rank == groups.pp_rank == 0:
        results = [None] * groups.dp
        dist.gather_object(result, results if groups.rank == 0 else None, 0, groups.dp_group)
    return [result for result in results if result is not None] if groups.rank == 0 else []


def _from_rank_0(function: Callable[[], T], groups: ProcessGroups) -> T:
    """What `function` gives on rank 0, on every rank; its NeoXError is raised on every rank.

    On a cluster perhaps only rank 0 has the files. Collective over the world.
    """
    answer: list[Any] = [None, None]  # the value, the error
    if groups.rank == 0:
        try:
            answer[0] = function()
        except NeoXError as error:
            answer[1] = error
    if groups.world_size > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
