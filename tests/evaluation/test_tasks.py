"""From names to lm-eval's tasks: the right documents, prompts and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neox.errors import ConfigError, DataError
from neox.evaluation.tasks import load_tasks, local_data, match_names
from tests import small_tokenizer
from tests.evaluation import models

DEMO = Path(__file__).parents[2] / "configs" / "demo_eval"


def load(**values: Any) -> dict[str, Any]:
    values = {"eval_data_dir": str(DEMO), "eval_own_documents": True} | values
    return load_tasks(models.config(**values))["tasks"]


def requests(task: Any) -> list[tuple[str, str]]:
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def test_lambada_s_prompts_and_metrics_are_lm_eval_s():
    tasks = load(eval_tasks=["lambada"])
    assert list(tasks) == ["lambada_openai"]
    task = tasks["lambada_openai"]
    pairs = requests(task)
    assert len(pairs) == 40
    context, target = pairs[0]
    assert context.startswith("A list keeps its items") and context.endswith(
        "later, do not use a tuple; use a"
    )
    assert target == " list"
    assert set(task.aggregation()) == {"perplexity", "acc"}


def test_piqa_s_prompts_and_metrics_are_lm_eval_s():
    task = load(eval_tasks=["piqa"])["piqa"]
    pairs = requests(task)
    assert len(pairs) == 80
    question = "Question: How do you get the last item of a list in Python?\nAnswer:"
    assert [context for context, _ in pairs[:2]] == [question] * 2
    assert {target for _, target in pairs[:2]} == {
        " Use the index -1, which counts from the end.",
        " Use the index 1, which counts from the end.",
    }
    assert set(task.aggregation()) == {"acc", "acc_norm"}
    labels = [document["label"] for document in task.eval_docs]
    assert sorted(labels) == [0] * 20 + [1] * 20


def test_whether_the_documents_are_those_published_is_asked_and_told():
    with pytest.raises(DataError, match=r"lambada_test.jsonl is incomplete: .* eval_own_documents"):
        load(eval_tasks=["lambada"], eval_own_documents=False)
    data = local_data(load(eval_tasks=["piqa"])["piqa"])
    assert data is not None
    assert data.facts()["file"] == str(DEMO / "piqa" / "valid.jsonl")
    assert not data.facts()["published"]
    assert set(data.facts()["sha256"]) == {"valid.jsonl", "valid-labels.lst"}


def test_a_system_instruction_and_a_chat_template_must_make_a_prompt(tmp_path):
    small_tokenizer.write(tmp_path)
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    values = {"apply_chat_template": True, "system_instruction": "Choose."}
    task = load(eval_tasks=["piqa"], vocab_file=str(tmp_path / "tokenizer.json"), **values)["piqa"]
    start = "[system] Choose.[user] Question: How do you"
    assert task.instances[0].args[0].startswith(start)


def test_tasks_come_in_the_order_asked_for_and_once():
    assert list(load(eval_tasks=["piqa", "lambada", "lambada_openai"])) == [
        "piqa",
        "lambada_openai",
    ]


def test_by_default_it_is_what_the_folder_has(tmp_path, capsys):
    assert list(load()) == ["lambada_openai", "piqa"]
    assert "no eval_tasks given: evaluating lambada_openai, piqa" in capsys.readouterr().out
    (tmp_path / "lambada_test.jsonl").write_bytes(
        (DEMO / "lambada" / "lambada_test.jsonl").read_bytes()
    )
    assert list(load(eval_data_dir=str(tmp_path))) == ["lambada_openai"]


def test_damage_matters_to_those_who_ask_for_the_task(tmp_path):
    lambada = DEMO / "lambada" / "lambada_test.jsonl"
    (tmp_path / lambada.name).write_bytes(lambada.read_bytes())
    (tmp_path / "valid.jsonl").write_text("nonsense")
    assert list(load(eval_data_dir=str(tmp_path), eval_tasks=["lambada"])) == ["lambada_openai"]
    for asked in (None, ["piq[ab]"]):
        with pytest.raises(DataError, match=r"valid.jsonl, line 1: not JSON"):
            load(eval_data_dir=str(tmp_path), eval_tasks=asked)


def test_the_console_gets_our_lines_only(capsys):
    load(eval_tasks=["piqa"])
    out, err = capsys.readouterr()
    assert out == f"piqa: 40 documents in {DEMO / 'piqa' / 'valid.jsonl'}, not the published ones\n"
    assert err == ""


def test_fewshot_examples_need_the_training_set():
    with pytest.raises(
        DataError, match=r"put train.jsonl and train-labels.lst into .*demo_eval/piqa"
    ):
        load(eval_tasks=["piqa"], num_fewshot=2)


def test_a_data_folder_that_is_none(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load(eval_data_dir=str(tmp_path / "nowhere"))


KNOWN = ["arc_challenge", "arc_easy", "hellaswag", "lambada", "lambada_openai", "piqa"]


@pytest.mark.parametrize(
    "requested, expected",
    [
        (["piqa", "arc_easy"], ["piqa", "arc_easy"]),
        (["arc_*"], ["arc_challenge", "arc_easy"]),
        (["arc_easy", "arc_*", "piqa"], ["arc_easy", "arc_challenge", "piqa"]),
        (["?iqa", "hella*"], ["piqa", "hellaswag"]),
    ],
)
def test_wildcards(requested, expected):
    assert match_names(requested, KNOWN) == expected


@pytest.mark.parametrize(
    "name, message",
    [
        ("piqua", "lm-eval has no task 'piqua'; did you mean piqa"),
        ("helaswag", "no task 'helaswag'; did you mean hellaswag"),
        ("mmlu_*", r"no task 'mmlu_\*'; `lm-eval ls tasks` lists them"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ConfigError, match=message):
        match_names(["piqa", name], KNOWN)


OFFLINE = """
import sys
from neox.errors import NeoXError
from neox.evaluation.tasks import load_tasks
from tests.evaluation import models
try:
    load_tasks(models.config(eval_tasks=["lambada"], eval_data_dir=sys.argv[1] or None))
except NeoXError as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize(
    "with_folder, advice",
    [
        (False, "set eval_data_dir to a folder and put into it lambada/lambada_test.jsonl (OpenAI"),
        (True, "put into {folder} (eval_data_dir) lambada/lambada_test.jsonl (OpenAI"),
    ],
)
def test_offline_with_nothing_local_says_which_file_goes_where(tmp_path, with_folder, advice):
    """In a process of its own: the hub's client reads its settings once, when it is imported."""
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path) if with_folder else ""],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stderr == ""
    line, error = done.stdout.splitlines()
    assert line == "lambada_openai: documents from the Hugging Face hub or its cache"
    assert error.startswith("DataError: lambada_openai: its documents could not be had from the")
    assert advice.format(folder=tmp_path) in error
