"""Reads the samples of an evaluation: the documents of one task and their answers.

A results file of evaluate.py names a .jsonl of samples for each task; lm-eval's --log_samples
writes such files too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from neox.errors import DataError

WIDTH = 80  # of a document's text; tools/compare_evals.py has columns before it
# Logged as [log-likelihood, words or bytes] of a document; `perplexity` as the log-likelihood.
PER_LENGTH = ("word_perplexity", "byte_perplexity", "bits_per_byte")
LIKELIHOODS = ("perplexity", *PER_LENGTH)


class Sample(NamedTuple):
    """What is needed of a line: one document, its answer read by one filter."""

    doc_hash: str
    prompt_hash: str
    text: str
    values: dict[str, tuple[float, float] | None]  # (value, weight); None: no number


def read_names(path: Path) -> dict[str, Path]:
    """The file of each task's samples that a results file names."""
    try:
        samples = json.loads(path.read_bytes()).get("samples") or {}
        files = {task: path.parent / name for task, name in samples.items()}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from None
    except (AttributeError, TypeError):
        raise DataError(f"{path} is not a results file of evaluate.py.") from None
    if not files:
        raise DataError(f'{path} names no "samples": evaluate again, or give two .jsonl files.')
    return files


def read_samples(path: Path) -> dict[str, dict[int, Sample]]:
    """The samples in a .jsonl, by filter and doc_id. DataError with the line that is damaged."""
    samples: dict[str, dict[int, Sample]] = {}
    line = 0
    try:
        with path.open("rb") as file:
            for line, text in enumerate(file, start=1):  # noqa: B007, for the messages
                record = json.loads(text)
                number, of_filter = int(record["doc_id"]), samples.setdefault(record["filter"], {})
                if number in of_filter:
                    raise ValueError(f"document {number} was there before")
                values = {name: metric_value(name, record[name]) for name in record["metrics"]}
                hashes = record["doc_hash"], record["prompt_hash"]
                of_filter[number] = Sample(*hashes, beginning(record), values)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (LookupError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else f"is damaged ({error})"
        raise DataError(f"{path}, line {line} {reason}: it is no sample of lm-eval's.") from None
    if not samples:
        raise DataError(f"{path} is empty.")
    return samples


def metric_value(metric: str, logged: Any) -> tuple[float, float] | None:
    """(value, weight); None for what is no number, as of a metric of all documents together."""
    value, weight = logged if metric in PER_LENGTH else (logged, 1.0)
    if not isinstance(value, int | float):
        return None
    if not math.isfinite(value + weight):
        raise ValueError(f"{metric} is {logged}")
    return float(value), float(weight)


def beginning(record: dict[str, Any]) -> str:
    """The beginning of the document itself in its prompt, behind solved examples, on one line."""
    requests, document = record["arguments"], record["doc"]
    # lm-eval's files have {"gen_args_0": {"arg_0": prompt, ...}, ...} for [[prompt, ...], ...].
    request = requests["gen_args_0"] if isinstance(requests, dict) else requests[0]
    prompt = str(request["arg_0"] if isinstance(request, dict) else request[0])
    fields = document.values() if isinstance(document, dict) else [document]
    # A prompt may leave out an end, as LAMBADA's does; what is short may be in the examples too.
    found = [text for text in fields if isinstance(text, str) and text[:40] in prompt]
    start = prompt.rfind(max(found, key=len)[:40]) if any(found) else 0
    text = " ".join(prompt[start : start + 4 * WIDTH].split())[:WIDTH]
    return "".join(letter if letter.isprintable() else "?" for letter in text)
