"""Scores as people and programs want them: a table, files, numbers for W&B."""

from __future__ import annotations

import datetime
import errno
import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from neox import atomic
from neox.errors import ConfigError
from neox.evaluation.published import Published, compare

# What results were called before lm-eval put a filter's name behind a metric's.
OLD_NAMES = {"acc": "acc", "acc_norm": "acc_norm", "perplexity": "ppl"}


class Score(NamedTuple):
    task: str
    metric: str  # lm-eval's name; with its filter's name behind it unless that is "none"
    value: float
    stderr: float | None
    documents: int


def check_prefix(prefix: str) -> None:
    """Make the results' folder before hours go into them. Raises ConfigError where that fails."""
    folder = Path(f"{prefix}_").parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(
            f"eval_results_prefix is {prefix!r}, but results cannot be written to {folder}: "
            f"{error.strerror}."
        ) from error


def write_results(results: Mapping[str, Any], prefix: str) -> Path:
    """Write `[{prefix}_]eval_results_{now}.json`; in the working directory, as upstream does.

    Each task's documents go into `[{prefix}_]eval_samples_{task}_{now}.jsonl` beside it, one a
    line, as lm-eval logs them. The results name those files under "samples".
    """
    now = second = datetime.datetime.now().strftime("%m-%d-%Y-%H-%M-%S")
    start = f"{prefix}_" if prefix else ""
    path = Path(f"{start}eval_results_{now}.json")
    for number in itertools.count(2):  # several runs within a second
        if not path.exists():
            break
        now = f"{second}-{number}"
        path = Path(f"{start}eval_results_{now}.json")
    files = {}
    for task, samples in results.get("samples", {}).items():
        file = Path(f"{start}eval_samples_{re.sub(r'[^-.0-9A-Za-z]', '_', task)}_{now}.jsonl")
        with atomic.replacing(file) as output:
            for sample in samples:
                output.write(_line(sample))
        files[task] = file.name
    whole = {**results, "samples": files, "results": with_old_names(results["results"])}
    atomic.write_text(path, json.dumps(whole, indent=4, default=str) + "\n")
    return path


def _line(sample: Mapping[str, Any]) -> bytes:
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(sample, default=handle_non_serializable, ensure_ascii=False)
    return f"{text}\n".encode(errors="surrogatepass")


def with_old_names(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """lm-eval's metrics of every task, and behind them the same by the names of upstream's files.

    acc, acc_norm and ppl, and their _stderr.
    """
    both = {}
    for task, values in results.items():
        old = {}
        for metric, name in OLD_NAMES.items():
            for suffix in ("", "_stderr"):
                if f"{metric}{suffix},none" in values:
                    old[name + suffix] = values[f"{metric}{suffix},none"]
        both[task] = {**values, **old}
    return both


def scores(results: Mapping[str, Any]) -> list[Score]:
    """Every metric of every task and group in `evaluate`'s results."""
    found = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            found.append(
                Score(
                    task,
                    metric if filtered == "none" else f"{metric}_{filtered}",
                    float(value),
                    None if stderr is None or isinstance(stderr, str) else float(stderr),
                    int(values["sample_len"]),
                )
            )
    return found


def tracker_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """`metrics` under the names of W&B's charts, `eval/{task}_{metric}`."""
    return {f"eval/{name}": value for name, value in metrics(results).items()}


def metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """`{task}_{metric}` -> value, and `{task}_{metric}_stderr` where there is one."""
    values = {}
    for score in scores(results):
        values[f"{score.task}_{score.metric}"] = score.value
        if score.stderr is not None:
            values[f"{score.task}_{score.metric}_stderr"] = score.stderr
    return values


def published_beside(results: Mapping[str, Any], model: Published) -> dict[str, Any]:
    """What was published of `model`, where it compares: no examples, no template, all documents.

    {"model", "source", "figures": {task: {metric: {"published", "agrees", "standard_errors"}}}}.
    """
    figures: dict[str, dict[str, Any]] = {}
    changed = any(results["config"][key] for key in ("system_instruction", "apply_chat_template"))
    for score in scores(results):
        count = results["n-samples"].get(score.task, {})
        whole = count.get("effective") == count.get("original")
        own = not results["data"].get(score.task, {}).get("published", True)
        if changed or own or not whole or results["n-shot"].get(score.task):
            continue
        compared = compare(model, score.task, score.metric, score.value, score.stderr)
        if compared is not None:
            figures.setdefault(score.task, {})[score.metric] = {
                "published": compared.published,
                "agrees": compared.agrees,
                "standard_errors": compared.distance,
            }
    return {"model": model.name, "source": model.source, "figures": figures}


def table(results: Mapping[str, Any]) -> str:
    """The scores for people: task, metric, value, standard error, documents scored (of all).

    With what was published of the model, if anything was, and whether it agrees.
    """
    rows = [["task", "metric", "value", "stderr", "documents"]]
    published = results.get("published") or {"figures": {}}
    if published["figures"]:
        rows[0] += [published["model"], ""]
    for score in scores(results):
        stderr = "" if score.stderr is None else _four_digits(score.stderr)
        documents = str(score.documents)
        everything = results["n-samples"].get(score.task, {}).get("original", score.documents)
        if score.documents < everything:
            documents += f" of {everything}"
        row = [score.task, score.metric, _four_digits(score.value), stderr, documents]
        if published["figures"]:
            row += _verdict(published["figures"].get(score.task, {}).get(score.metric))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, 1, 6) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _verdict(figure: Mapping[str, Any] | None) -> list[str]:
    if figure is None:
        return ["", ""]
    if figure["agrees"]:
        return [figure["published"], "agrees"]
    errors = figure["standard_errors"]
    far = "" if errors is None else f" by {errors:.1f} standard errors"
    return [figure["published"], f"differs{far}"]


def _four_digits(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"
