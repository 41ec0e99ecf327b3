"""tools/compare_evals.py as a user runs it, and its p-values against scipy's."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from tools import compare_evals

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch, capsys) -> Run:
    """Runs a command line in `tmp_path`: status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = compare_evals.main(words)
        return (status, *capsys.readouterr())

    return call


def logged(number: int, **metrics: Any) -> dict[str, Any]:
    """A line as lm-eval logs it."""
    goal = f"How is thing number {number} done in the end?"
    return {
        "doc_id": number,
        "doc": {"sol1": "Well.", "sol2": "Badly.", "goal": goal, "label": 0},
        "target": 0,
        "arguments": [[f"Question: {goal}\nAnswer:", " Well."], ["...", " Badly."]],
        "resps": [[[-1.0, False]], [[-2.0, False]]],
        "filtered_resps": [[-1.0, False], [-2.0, False]],
        "filter": "none",
        "metrics": list(metrics),
        "doc_hash": f"document {number}",
        "prompt_hash": f"prompt {number}",
        "target_hash": "target",
        **metrics,
    }


def answers(bits: str, metric: str = "acc") -> list[dict[str, Any]]:
    return [logged(number, **{metric: float(bit)}) for number, bit in enumerate(bits)]


def write(path: str, records: Iterable[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(exist_ok=True, parents=True)
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


def results(name: str, **tasks: list[dict[str, Any]]) -> str:
    """A results file with its samples in a folder beside it."""
    for task, records in tasks.items():
        write(f"{name}/{task}.jsonl", records)
    files = {task: f"{Path(name).name}/{task}.jsonl" for task in tasks}
    path = Path(f"{name}_eval_results_1.json")
    path.write_text(json.dumps({"results": {}, "samples": files}))
    return str(path)


def test_two_results_files(run: Run) -> None:
    a = results("runs/a", piqa=answers("1" * 50 + "1000000" + "0" * 43))
    b = results("runs/b", piqa=answers("1" * 50 + "0111111" + "0" * 43))
    status, out, err = run(a, b)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "A  runs/a_eval_results_1.json",
        "B  runs/b_eval_results_1.json",
        "piqa: 100 documents in both",
        "",
        "piqa acc, 100 documents: 7 differ",
        "  A 0.51, B 0.56",
        "  both right 50, only A 1, only B 6, neither 43",
        "  McNemar's exact test, two-sided: p = 0.12",  # 2 (1 + 7) / 2^7
        "  document  A  B",
        "        50  1  0  How is thing number 50 done in the end? Answer:",
        *(
            f"        {number}  0  1  How is thing number {number} done in the end? Answer:"
            for number in range(51, 57)
        ),
        "",
        "piqa acc: B answers 5 more documents right (p = 0.12): not significant at 5 %",
    ]


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ("1" * 6, "0" * 6, "A answers 6 more documents right (p = 0.031): significant at 5 %"),
        ("0" * 20, "1" * 20, "B answers 20 more documents right (p < 0.001): significant at 5 %"),
        ("10", "11", "B answers 1 more document right (p = 1): not significant at 5 %"),
        (
            "1010",
            "0110",
            "A and B answer equally many right, but 2 documents differently (p = 1): not "
            "significant at 5 %",
        ),
        ("1010", "1010", "no document differs"),
    ],
)
def test_the_last_line(run: Run, a: str, b: str, said: str) -> None:
    write("a.jsonl", answers(a))
    write("b.jsonl", answers(b))
    status, out, _ = run("a.jsonl", "b.jsonl", "--task", "piqa")
    assert status == 0
    assert out.splitlines()[-1] == f"piqa acc: {said}"


def test_equal_files(run: Run) -> None:
    write("a.jsonl", [logged(n, acc=float(n % 2), perplexity=-1.5 * n) for n in range(9)])
    status, out, err = run("a.jsonl", "a.jsonl")
    assert (status, err) == (0, "")
    assert "a acc: no document differs" in out
    assert "a perplexity: no document differs" in out
    assert "document  A  B" not in out


PAIRS = [(0, 0), (1, 0), (0, 5), (5, 5), (1, 6), (20, 32), (32, 20), (300, 361), (3000, 3100)]


@pytest.mark.parametrize(("only_a", "only_b"), PAIRS)
def test_mcnemar_is_scipys_binomial_test(only_a: int, only_b: int) -> None:
    tosses = only_a + only_b
    expected = stats.binomtest(only_a, tosses, 0.5).pvalue if tosses else 1.0
    assert compare_evals.mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand() -> None:
    # 2 (1 + 10 + 45) / 1024, and both tails of 4 tosses: 1 + 4 + 6 + 4 + 1 of 16.
    assert compare_evals.mcnemar(2, 8) == 2 * 56 / 1024
    assert compare_evals.mcnemar(0, 1) == compare_evals.mcnemar(2, 2) == 1.0


def test_a_perplexity_is_tested_by_its_log_likelihoods(run: Run) -> None:
    a = [-2.0 - 0.1 * (n % 7) for n in range(40)]
    b = [value + 0.02 * (n % 5) - 0.01 for n, value in enumerate(a)]
    write("a.jsonl", [logged(n, perplexity=value) for n, value in enumerate(a)])
    write("b.jsonl", [logged(n, perplexity=value) for n, value in enumerate(b)])
    status, out, _ = run("a.jsonl", "b.jsonl", "--task", "lambada_openai", "--json", "new/x.json")
    assert status == 0
    (found,) = json.loads(Path("new/x.json").read_text())["metrics"]
    assert found["a"] == pytest.approx(math.exp(-statistics.fmean(a)))
    assert found["b"] == pytest.approx(math.exp(-statistics.fmean(b)))
    assert found["mean_difference"] == pytest.approx(0.03)
    changes = [y - x for x, y in zip(a, b, strict=True)]
    assert found["stderr"] == pytest.approx(stats.sem(changes))
    assert found["p"] == pytest.approx(2 * stats.norm.sf(0.03 / stats.sem(changes)), abs=1e-15)
    assert found["both_right"] is None
    lines = out.splitlines()
    assert "lambada_openai perplexity, 40 documents: 40 differ" in lines
    assert f"  A {found['a']:.4g}, B {found['b']:.4g}" in lines
    assert "  B - A of the documents' log-likelihoods: mean 0.03" in lines
    assert f"  standard error {found['stderr']:.4g}" in lines
    assert "  normal approximation, two-sided: p < 0.001" in lines
    assert lines[-1] == (
        "lambada_openai perplexity: B's log-likelihoods are higher by 0.03 on average (p < 0.001): "
        "significant at 5 %"
    )


def test_metrics_per_word_and_byte(run: Run) -> None:
    def record(number: int, likelihood: float) -> dict[str, Any]:
        pairs = {"word_perplexity": 10 + number, "bits_per_byte": 50}
        return logged(number, **{name: [likelihood, n] for name, n in pairs.items()})

    write("a.jsonl", [record(0, -20.0), record(1, -40.0)])
    write("b.jsonl", [record(0, -20.0), record(1, -30.0)])
    assert run("a.jsonl", "b.jsonl", "--json", "x.json")[0] == 0
    words, bits = json.loads(Path("x.json").read_text())["metrics"]
    assert words["a"] == pytest.approx(math.exp(60 / 21))
    assert words["b"] == pytest.approx(math.exp(50 / 21))
    assert bits["a"] == pytest.approx(60 / 100 / math.log(2))
    assert words["mean_difference"] == bits["mean_difference"] == 5.0
    assert words["p"] == pytest.approx(2 * stats.norm.sf(1.0))


def test_other_numbers_of_one_and_of_few_documents(run: Run) -> None:
    write("a.jsonl", [logged(0, rouge1=0.25)])
    write("b.jsonl", [logged(0, rouge1=0.75)])
    status, out, _ = run("a.jsonl", "b.jsonl", "--task", "t")
    assert status == 0
    assert out.splitlines()[-1] == (
        "t rouge1: B is higher by 0.5 on average; one document is too few for a test"
    )
    write("a.jsonl", [logged(n, rouge1=0.25 + n) for n in range(3)])
    write("b.jsonl", [logged(n, rouge1=0.75 + n) for n in range(3)])
    _, out, _ = run("b.jsonl", "a.jsonl", "--task", "t")
    assert "  normal approximation, rough below 30 documents, two-sided: p < 0.001" in out
    assert "t rouge1: B is lower by 0.5 on average (p < 0.001)" in out


def test_documents_that_do_not_match_are_counted(run: Run) -> None:
    a, b = answers("1" * 8), answers("1" * 10)[2:]
    b[0]["doc_hash"] = "another document"
    b[1]["prompt_hash"] = b[2]["prompt_hash"] = "another prompt"
    write("a.jsonl", a)
    write("b.jsonl", b)
    status, out, err = run("a.jsonl", "b.jsonl", "--task", "t", "--json", "x.json")
    assert status == 0
    assert out.splitlines()[2] == (
        "t: 5 documents in both; left out: 2 only in A, 2 only in B, 1 with the same number and "
        "other contents"
    )
    assert err == (
        "warning: t: 2 documents with another prompt in A than in B, as with another number of "
        "solved examples\n"
    )
    (counts,) = json.loads(Path("x.json").read_text())["documents"]
    assert counts == {
        "task": "t", "filter": "none", "in_both": 5, "only_in_a": 2, "only_in_b": 2,
        "other_contents": 1, "other_prompts": 2,
    }  # fmt: skip


def test_a_list_is_cut_but_for_all(run: Run) -> None:
    write("a.jsonl", reversed(answers("1" * 30)))
    write("b.jsonl", answers("0" * 30))
    _, out, _ = run("a.jsonl", "b.jsonl", "--json", "x.json")
    rows = [line.split()[0] for line in out.splitlines() if "thing number" in line]
    assert rows == [str(number) for number in range(20)]
    assert "  and 10 more: --all" in out
    _, out, _ = run("a.jsonl", "b.jsonl", "--all")
    assert (out.count("thing number"), "more: --all" in out) == (30, False)
    (found,) = json.loads(Path("x.json").read_text())["metrics"]
    assert len(found["differing"]) == 30
    assert found["differing"][0] == {
        "doc_id": 0, "a": 1.0, "b": 0.0, "text": "How is thing number 0 done in the end? Answer:"
    }  # fmt: skip


def test_tasks_metrics_and_filters(run: Run) -> None:
    piqa = [logged(n, acc=1.0, acc_norm=0.0, f1=[0, 1]) for n in range(3)]
    math_a = [logged(n, exact_match=1) | {"filter": f} for f in ("strict", "free") for n in (0, 1)]
    math_b = [logged(n, exact_match=0) | {"filter": f} for f in ("strict", "other") for n in (0, 1)]
    a = results("a", piqa=piqa, gsm8k=math_a, mine=piqa)
    b = results("b", piqa=piqa, gsm8k=math_b)
    status, out, _ = run(a, b)
    assert status == 0
    lines = out.splitlines()
    assert "only in A: mine" in lines
    assert "piqa f1 is not compared: it has no number for each document" in lines
    assert "gsm8k_strict: 2 documents in both" in lines
    assert (
        "gsm8k_free: 0 documents in both; left out: 2 only in A, 0 only in B, 0 with the "
        "same number and other contents"
    ) in lines
    assert lines[-4:] == [
        "piqa acc: no document differs",
        "piqa acc_norm: no document differs",
        "gsm8k exact_match_strict: A answers 2 more documents right (p = 0.5): not significant at "
        "5 %",
        "The p-values are not corrected for the number of tests, 3; with Bonferroni's correction "
        "those below 0.0167 are significant.",
    ]
    for words, count in [
        (["--task", "piqa"], 2),
        (["--task", "piqa", "--metric", "acc"], 1),
        (["--metric", "exact_match"], 1),
        (["--metric", "exact_match_strict", "--metric", "acc_norm"], 2),
        (["--task", "gsm8k", "--task", "piqa"], 3),
    ]:
        status, out, _ = run(a, b, *words, "--json", "x.json")
        assert status == 0
        assert len(json.loads(Path("x.json").read_text())["metrics"]) == count
        assert ("not corrected" in out) == (count > 1)


def test_the_text_begins_behind_solved_examples(run: Run) -> None:
    a, b = answers("1"), answers("0")
    solved = "Question: How is it done?\nAnswer: Well.\n\n" * 5
    # As lm-eval's own files have it; and what would upset a terminal.
    prompt = f"{solved}Question: {a[0]['doc']['goal']}\n\x1b[2JAnswer:"
    a[0]["arguments"] = {"gen_args_0": {"arg_0": prompt, "arg_1": " Well."}}
    write("a.jsonl", a)
    write("b.jsonl", b)
    _, out, _ = run("a.jsonl", "b.jsonl")
    assert "         0  1  0  How is thing number 0 done in the end? ?[2JAnswer:\n" in out


GOOD = json.dumps(logged(0, acc=1.0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "b.jsonl is empty."),
        (GOOD + "\n" + GOOD[:99], "b.jsonl, line 2 is damaged (Unterminated string"),
        ("[]", "b.jsonl, line 1 is damaged (list indices"),
        (GOOD.replace('"doc_id": 0', '"doc_id": null'), "b.jsonl, line 1 is damaged ("),
        (GOOD.replace("doc_hash", "hash"), "b.jsonl, line 1 has no 'doc_hash': it is no sample"),
        (GOOD.replace('"metrics": ["acc"]', '"metrics": ["em"]'), "b.jsonl, line 1 has no 'em'"),
        (GOOD.replace('"acc": 1.0', '"acc": NaN'), "b.jsonl, line 1 is damaged (acc is nan)"),
        (GOOD.replace('"acc": 1.0', '"acc": 1' + 400 * "0"), "b.jsonl, line 1 is damaged ("),
        (GOOD + "\n" + GOOD, "b.jsonl, line 2 is damaged (document 0 was there before)"),
        (GOOD.replace("document 0", "another"), "have no document in common: those with the same"),
        (GOOD.replace('"doc_id": 0', '"doc_id": 1'), "a.jsonl and b.jsonl have no document in"),
        (GOOD.replace("acc", "em"), "No metric is left to compare: A has acc."),
        ("[" * 100_000, "b.jsonl, line 1 is damaged ("),
        (b"\xff\xfe", "b.jsonl, line 1 is damaged ("),
    ],
)
def test_damaged_samples(run: Run, text: str | bytes, said: str) -> None:
    Path("a.jsonl").write_text(GOOD)
    Path("b.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    status, _, err = run("a.jsonl", "b.jsonl")
    assert status == 2
    assert err.startswith("error: ") and said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "b.json cannot be read: No such file or directory."),
        ('{"results": {}}', 'b.json names no "samples": evaluate again'),
        ('{"samples": [1]}', "b.json is not a results file of evaluate.py."),
        ('{"samples": {"piqa": 1}}', "b.json is not a results file of evaluate.py."),
        ("[]", "b.json is not a results file of evaluate.py."),
        ('{"samples', "b.json is not JSON: Unterminated string"),
        (
            '{"samples": {"arc": "arc.jsonl"}}',
            "no task is in both. a_eval_results_1.json has piqa; b.json has arc.",
        ),
        ('{"samples": {"piqa": "gone.jsonl"}}', "gone.jsonl cannot be read: No such file"),
    ],
)
def test_results_files_that_do_not_do(run: Run, text: str | None, said: str) -> None:
    a = results("a", piqa=answers("10"))
    if text is not None:
        Path("b.json").write_text(text)
    status, _, err = run(a, "b.json")
    assert status == 2
    assert err.startswith("error: ") and said in err
    assert err.count("\n") == 1


def test_what_cannot_be_chosen(run: Run) -> None:
    a, b = results("a", piqa=answers("10")), results("b", piqa=answers("11"))
    for words, said in [
        ((a, b, "--task", "arc"), f"--task arc: not in both. {a} has piqa; {b} has piqa."),
        ((a, b, "--metric", "em"), "No metric is left to compare: A has acc."),
        ((a, "b/piqa.jsonl"), f"{a} and b/piqa.jsonl: give two results files (.json), or two"),
        ((a, b, "--json", "a/piqa.jsonl/x"), "--json: a/piqa.jsonl/x: "),
        ((a, "."), ". cannot be read: Is a directory."),
    ]:
        status, _, err = run(*words)
        assert status == 2
        assert err.startswith(f"error: {said}")
