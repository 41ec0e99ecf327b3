#!/usr/bin/env python3
"""Say which documents two evaluations answer differently, and whether that is significant.

    python tools/compare_evals.py old_eval_results_DATE.json new_eval_results_DATE.json
    python tools/compare_evals.py A.json B.json --task piqa --metric acc --all --json piqa.json
    python tools/compare_evals.py samples_a.jsonl samples_b.jsonl

A and B are two results files of evaluate.py, or two files of one task's samples (.jsonl, of ours or
of lm-eval's --log_samples). Each document is compared with itself, so that a difference may be
significant although it is smaller than the scores' standard errors.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox import atomic, log
from neox.cluster.main import exit_status
from neox.errors import ConfigError, DataError
from neox.evaluation.samples import LIKELIHOODS, Sample, read_names, read_samples

LEVEL = 0.05  # of significance
LISTED = 20  # documents, without --all
FEW = 30  # documents, whose mean is not near to a normal distribution yet

Pairs = dict[int, tuple[Sample, Sample]]  # by doc_id, of A and of B


@dataclass(frozen=True)
class Matching:
    """How many documents of a task and filter are compared, and why others are not."""

    task: str
    filter: str
    in_both: int
    only_in_a: int
    only_in_b: int
    other_contents: int  # the same doc_id, but not the same document
    other_prompts: int  # of those in both

    def labelled(self, name: str) -> str:
        """With the filter's name behind it, as in evaluate.py's table."""
        return name if self.filter == "none" else f"{name}_{self.filter}"

    def tell(self) -> None:
        name = self.labelled(self.task)
        line = f"{name}: {_documents(self.in_both)} in both"
        if self.only_in_a or self.only_in_b or self.other_contents:
            line += f"; left out: {self.only_in_a} only in A, {self.only_in_b} only in B, "
            line += f"{self.other_contents} with the same number and other contents"
        print(line)
        if self.other_prompts:
            log.warning(
                f"{name}: {_documents(self.other_prompts)} with another prompt in A than in B, as "
                "with another number of solved examples"
            )


@dataclass(frozen=True)
class Comparison:
    """A metric over the documents of both: of right and wrong answers, or of other numbers."""

    task: str
    metric: str
    documents: int
    differ: int
    a: float
    b: float
    p: float | None  # two-sided; None for numbers of a single document
    # Of answers. Those that differ have doc_id, a, b, text.
    both_right: int | None = None
    only_a: int = 0
    only_b: int = 0
    neither: int = 0
    differing: list[dict[str, Any]] = field(default_factory=list)
    # Of other numbers: B - A. Of a perplexity, that of the log-likelihoods.
    mean_difference: float | None = None
    stderr: float | None = None

    def lines(self, limit: int | None) -> Iterator[str]:
        yield f"{self.task} {self.metric}, {_documents(self.documents)}: {self.differ} differ"
        yield f"  A {self.a:.4g}, B {self.b:.4g}"
        if self.both_right is not None:
            only = f"only A {self.only_a}, only B {self.only_b}"
            yield f"  both right {self.both_right}, {only}, neither {self.neither}"
            yield f"  McNemar's exact test, two-sided: {_shown(self.p)}"
        else:
            what = " of the documents' log-likelihoods" if self._is_perplexity() else ""
            yield f"  B - A{what}: mean {self.mean_difference:.4g}"
            if self.stderr is not None:
                rough = f", rough below {FEW} documents" * (self.documents < FEW)
                yield f"  standard error {self.stderr:.4g}"
                yield f"  normal approximation{rough}, two-sided: {_shown(self.p)}"
        if self.differing:
            yield "  document  A  B"
        for row in self.differing[:limit]:
            yield f"  {row['doc_id']:>8}  {row['a']:g}  {row['b']:g}  {row['text']}"
        if limit is not None and len(self.differing) > limit:
            yield f"  and {len(self.differing) - limit} more: --all"

    def verdict(self) -> str:
        title = f"{self.task} {self.metric}"
        if not self.differ:
            return f"{title}: no document differs"
        if self.p is None:
            return f"{title}: {self._change()}; one document is too few for a test"
        significant = "significant" if self.p < LEVEL else "not significant"
        return f"{title}: {self._change()} ({_shown(self.p)}): {significant} at {100 * LEVEL:g} %"

    def _change(self) -> str:
        if self.mean_difference is not None:
            what = "'s log-likelihoods are" if self._is_perplexity() else " is"
            direction = "higher" if self.mean_difference > 0 else "lower"
            return f"B{what} {direction} by {abs(self.mean_difference):.4g} on average"
        more = self.only_b - self.only_a
        if more == 0:
            return f"A and B answer equally many right, but {_documents(self.differ)} differently"
        right = "document right" if abs(more) == 1 else "documents right"
        return f"{'B' if more > 0 else 'A'} answers {abs(more)} more {right}"

    def _is_perplexity(self) -> bool:
        return self.metric.startswith(LIKELIHOODS)  # a filter's name may be behind


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("a", type=Path, metavar="A", help="results (.json) or samples (.jsonl)")
    add("b", type=Path, metavar="B", help="what to compare with it")
    add("--task", action="append", default=[], help="only this one; may be repeated")
    add("--metric", action="append", default=[], help="only this one; may be repeated")
    add("--all", action="store_true", help=f"list all documents that differ, not only {LISTED}")
    add("--json", type=Path, metavar="FILE", help="write everything to FILE, all documents too")
    options = parser.parse_args(arguments)
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    print(f"A  {options.a}\nB  {options.b}")
    matchings: list[Matching] = []
    comparisons: list[Comparison] = []
    known: list[str] = []
    for task, a, b in pair_files(options.a, options.b, options.task):
        for matching, pairs in match(task, a, b):
            matching.tell()
            matchings.append(matching)
            for metric in dict.fromkeys(name for one, _ in pairs.values() for name in one.values):
                known.append(matching.labelled(metric))
                if not options.metric or {metric, known[-1]} & set(options.metric):
                    comparisons += compare(metric, matching, pairs)
    if not comparisons:
        raise ConfigError(f"No metric is left to compare: A has {_names(known)}.")
    for comparison in comparisons:
        print("", *comparison.lines(None if options.all else LISTED), sep="\n")
    print("", *(comparison.verdict() for comparison in comparisons), sep="\n")
    tests = sum(comparison.p is not None for comparison in comparisons)
    if tests > 1:
        print(
            f"The p-values are not corrected for the number of tests, {tests}; with Bonferroni's "
            f"correction those below {LEVEL / tests:.3g} are significant."
        )
    if options.json:
        result: dict[str, Any] = {"a": str(options.a), "b": str(options.b)}
        result |= {"documents": [asdict(one) for one in matchings]}
        result |= {"metrics": [asdict(one) for one in comparisons]}
        try:
            atomic.write_text(options.json, json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--json: {options.json}: {error.strerror}.") from None
    return 0


def pair_files(a: Path, b: Path, chosen: list[str]) -> list[tuple[str, Path, Path]]:
    """(task, A's samples, B's samples) for every task of both, or for those that are chosen."""
    if (a.suffix == ".jsonl") != (b.suffix == ".jsonl"):
        raise ConfigError(
            f"{a} and {b}: give two results files (.json), or two files of samples (.jsonl), which "
            'results name under "samples".'
        )
    if a.suffix == ".jsonl":  # it does not say which task it is of
        return [(" ".join(chosen) or a.stem, a, b)]
    in_a, in_b = read_names(a), read_names(b)
    common = [task for task in in_a if task in in_b]
    if not common or not set(chosen) <= set(common):
        what = f"--task {' '.join(chosen)}: not" if chosen else "no task is"
        raise DataError(f"{what} in both. {a} has {_names(in_a)}; {b} has {_names(in_b)}.")
    for name, files in (("A", in_a), ("B", in_b)):
        if not chosen and len(files) > len(common):
            print(f"only in {name}: {_names(task for task in files if task not in common)}")
    return [(task, in_a[task], in_b[task]) for task in common if task in (chosen or common)]


def match(task: str, a: Path, b: Path) -> Iterator[tuple[Matching, Pairs]]:
    """For each filter, the documents of the same number and contents. DataError if there are none.

    A filter of one of them alone has no documents in both.
    """
    all_a, all_b = read_samples(a), read_samples(b)
    found = []
    for name in all_a | all_b:
        in_a, in_b = all_a.get(name, {}), all_b.get(name, {})
        both = {number: (in_a[number], in_b[number]) for number in sorted(in_a) if number in in_b}
        pairs = {n: (one, other) for n, (one, other) in both.items() if one[0] == other[0]}
        prompts = sum(one.prompt_hash != other.prompt_hash for one, other in pairs.values())
        alone = (len(in_a) - len(both), len(in_b) - len(both))
        changed = len(both) - len(pairs)
        found.append((Matching(task, name, len(pairs), *alone, changed, prompts), pairs))
    if not any(pairs for _, pairs in found):
        raise DataError(
            f"{a} and {b} have no document in common: those with the same number "
            f"({sum(matching.other_contents for matching, _ in found)}) have other contents."
        )
    yield from found


def compare(metric: str, matching: Matching, pairs: Pairs) -> Iterator[Comparison]:
    """The comparison of a metric, if it has numbers for documents of both."""
    numbers = {n: (a.values.get(metric), b.values.get(metric)) for n, (a, b) in pairs.items()}
    rows = {n: (a, b) for n, (a, b) in numbers.items() if a is not None and b is not None}
    label = matching.labelled(metric)
    if not rows:
        print(f"{matching.task} {label} is not compared: it has no number for each document")
        return
    in_a, in_b = zip(*rows.values(), strict=True)
    differing = {n: (a[0], b[0]) for n, (a, b) in rows.items() if a[0] != b[0]}
    scores = (score(metric, in_a), score(metric, in_b))
    common = (matching.task, label, len(rows), len(differing), *scores)
    if metric not in LIKELIHOODS and {value for value, _ in in_a + in_b} <= {0.0, 1.0}:
        both_right = sum(a[0] == b[0] == 1.0 for a, b in rows.values())
        only_a = sum(a > b for a, b in differing.values())
        only_b = len(differing) - only_a
        neither = len(rows) - both_right - len(differing)
        listed = [
            {"doc_id": n, "a": a, "b": b, "text": pairs[n][0].text}
            for n, (a, b) in differing.items()
        ]
        p = mcnemar(only_a, only_b)
        yield Comparison(*common, p, both_right, only_a, only_b, neither, listed)
        return
    changes = [b[0] - a[0] for a, b in rows.values()]
    mean = statistics.fmean(changes)
    if len(rows) == 1:
        yield Comparison(*common, None, mean_difference=mean)
        return
    stderr = statistics.stdev(changes) / math.sqrt(len(rows))
    far = abs(mean) / stderr if stderr else math.inf if mean else 0.0  # in standard errors
    p = 2 * statistics.NormalDist().cdf(-far)
    yield Comparison(*common, p, mean_difference=mean, stderr=stderr)


def score(metric: str, values: Sequence[tuple[float, float]]) -> float:
    """What the (value, weight) of documents come to together, as lm-eval has it."""
    mean = sum(value for value, _ in values) / (sum(weight for _, weight in values) or 1.0)
    if metric == "bits_per_byte":
        return -mean / math.log(2)
    return math.exp(min(-mean, 700.0)) if metric in LIKELIHOODS else mean  # no float has e**710


def mcnemar(only_a: int, only_b: int) -> float:
    """The two-sided p-value of McNemar's exact test.

    Where A and B are equally good, each document that only one answers is a toss of a coin.
    """
    tosses, fewer = only_a + only_b, min(only_a, only_b)
    ways = total = 1  # to choose 0, 1, ... `fewer` of the tosses: whole numbers, without rounding
    for chosen in range(fewer):
        ways = ways * (tosses - chosen) // (chosen + 1)
        total += ways
    return min(1.0, 2 * total / 2**tosses)


def _documents(number: int) -> str:
    return f"{number} document{'s' * (number != 1)}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "none"


def _shown(p: float | None) -> str:
    assert p is not None
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


if __name__ == "__main__":
    sys.exit(main())
