"""Tasks of the user's own: YAML files in include_path, over JSON lines beside them."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path
from typing import Any

import datasets.config
import pytest
from lm_eval import evaluator
from lm_eval.models.dummy import DummyLM

from neox.errors import ConfigError, DataError
from neox.evaluation import hub
from neox.evaluation.tasks import load_tasks, local_data
from tests.evaluation import models

DEMO = Path(__file__).parents[2] / "configs" / "demo_eval"
WRITES = {
    "task": "sums",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}},
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{sum}} =",
    "doc_to_target": "{{result}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
SUMS = [{"sum": "1 + 1", "result": "2"}, {"sum": "2 + 3", "result": "5"}]
PROSE = {
    "task": "prose",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": "texts/*.jsonl"},
    "output_type": "loglikelihood_rolling",
    "test_split": "train",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
CHOICE = {
    "task": "choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": ["choice.jsonl"]},
    "output_type": "multiple_choice",
    "test_split": "train",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{answers}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}],
}
CHOICES = [{"question": "The best of", "answers": ["times", "age"], "label": 0}]


def lines(*objects: Any) -> str:
    return "".join(json.dumps(o) + "\n" for o in objects)


def write(folder: Path, **files: Any) -> Path:
    """`files`: names without .yaml, and what they hold (JSON is YAML)."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task of each kind, and the cache of datasets elsewhere than at home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "own"
    (folder / "texts").mkdir(parents=True)
    (folder / "sums.jsonl").write_text(lines(*SUMS))
    (folder / "choice.jsonl").write_text(lines(*CHOICES))
    (folder / "texts" / "a.jsonl").write_text(lines({"text": "It was the best of times."}))
    return write(folder, sums=WRITES, prose=PROSE, choice=CHOICE)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whom a test asks. Nobody answers."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        raise OSError("there is no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


def load(own: Path, *names: str, **values: Any) -> Any:
    return load_tasks(models.config(include_path=str(own), eval_tasks=list(names), **values))


def requests(task: Any) -> list[Any]:
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def test_a_task_of_each_kind_from_local_files(own, no_network, capsys):
    """At once: lm-eval's own definitions are not looked through, and the hub is not asked."""
    hub.set_offline(False)
    tasks = load(own, "sums", "prose", "choice")
    out, err = capsys.readouterr()
    assert out == "".join(
        f"{name}: as {own / name}.yaml defines it\n" for name in ("sums", "prose", "choice")
    )
    assert err == ""
    assert no_network == []
    by_name = tasks["tasks"]
    assert requests(by_name["sums"])[1] == ("2 + 3 =", WRITES["generation_kwargs"])
    assert requests(by_name["prose"]) == [("It was the best of times.",)]
    assert requests(by_name["choice"]) == [("The best of", " times"), ("The best of", " age")]
    assert [local_data(task) for task in by_name.values()] == [None] * 3
    results = evaluator.evaluate(DummyLM(), tasks, bootstrap_iters=0)["results"]
    assert results["sums"]["exact_match,none"] == 0.0
    assert results["prose"]["word_perplexity,none"] > 1.0
    assert results["choice"]["acc,none"] in (0.0, 1.0)


def test_beside_lambada_and_piqa(own, no_network, capsys):
    names = ["lambada", "sums", "piqa"]
    data = {"eval_data_dir": str(DEMO), "eval_own_documents": True}
    assert list(load(own, *names, **data)["tasks"]) == ["lambada_openai", "sums", "piqa"]
    assert no_network == []
    assert "looking through" not in capsys.readouterr().out


def test_files_are_looked_for_beside_the_definition_first(own, tmp_path, monkeypatch):
    """lm-eval looks in the working directory, where they may still be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text(lines({"sum": "elsewhere", "result": "9"}))
    assert requests(load(own, "sums")["tasks"]["sums"])[0][0] == "1 + 1 ="
    (own / "sums.jsonl").unlink()
    assert requests(load(own, "sums")["tasks"]["sums"])[0][0] == "elsewhere ="
    (tmp_path / "sums.jsonl").unlink()
    with pytest.raises(DataError, match=f"sums.yaml makes no task .*'{own / 'sums.jsonl'}'"):
        load(own, "sums")


@pytest.mark.parametrize(
    "source",
    [
        {"dataset_path": "folder", "dataset_kwargs": None, "test_split": "train"},
        {"dataset_kwargs": {"data_dir": "folder"}, "test_split": "train"},
    ],
)
def test_a_folder_of_documents(own, no_network, source):
    (own / "folder").mkdir()
    (own / "sums.jsonl").rename(own / "folder" / "train.jsonl")
    write(own, sums=WRITES | source)
    assert len(requests(load(own, "sums")["tasks"]["sums"])) == 2
    assert no_network == []


def test_groups_tags_and_templates(own, capsys):
    (own / "common").write_text(json.dumps(WRITES))
    write(own, sums={"include": "common", "tag": "mine"}, prose=PROSE | {"tag": "mine"})
    inner = {key: value for key, value in CHOICE.items() if key != "task"}
    members = ["sums", {"task": "in_place", **inner}, {"group": "rest", "task": ["piqa", "prose"]}]
    write(own, all={"group": "all", "task": members})
    data = {"eval_data_dir": str(DEMO), "eval_own_documents": True}
    assert list(load(own, "mine")["tasks"]) == ["prose", "sums"]
    loaded = load(own, "all", **data)
    assert list(loaded["tasks"]) == ["sums", "all::in_place", "piqa", "prose"]
    assert set(loaded["groups"]) == {"all", "all::rest"}
    piqa = local_data(loaded["tasks"]["piqa"])
    assert piqa is not None
    assert piqa.path == DEMO / "piqa" / "valid.jsonl"
    assert "looking through" not in capsys.readouterr().out


def test_one_s_own_definition_wins_and_is_told(own, capsys):
    """Over lm-eval's of the same name, over our other name of a task, and over local documents."""
    write(own, a=CHOICE | {"task": "piqa"}, b=CHOICE | {"task": "lambada"})
    tasks = load(own, "piqa", "lambada", eval_data_dir=str(DEMO))["tasks"]
    assert requests(tasks["piqa"]) == requests(tasks["lambada"]) == requests_of_choice(own)
    out = capsys.readouterr().out
    assert out.startswith(
        f"piqa: as {own}/a.yaml defines it\nlambada: as {own}/b.yaml defines it\n"
    )


def requests_of_choice(own: Path) -> list[Any]:
    return requests(load(own, "choice")["tasks"]["choice"])


def test_wildcards_and_hints_know_them_too(own, capsys):
    """Only with lm-eval's own, which are looked through then."""
    write(own, again=WRITES | {"task": "sums_again"})
    assert list(load(own, "sum[s]*")["tasks"]) == ["sums", "sums_again"]
    assert "looking through lm-eval's task definitions" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no task 'sums_agian'; did you mean sums_again"):
        load(own, "sums_agian")
    write(own, all={"group": "all", "task": ["sums", "sums_gain"]})
    with pytest.raises(
        ConfigError, match=r"all is a group, and .* no task 'sums_gain' .* mean sums_again"
    ):
        load(own, "all")


BROKEN: list[tuple[Any, str]] = [
    ("task: x\n  y: z: 3\n", r"/x.yaml cannot be read \(line 2: mapping values are not allowed"),
    ("task: !new x", r"/x.yaml cannot be read \(line 1: could not determine .* tag '!new'\)"),
    ("- task: x", "/x.yaml cannot be read .*Expected YAML dict"),
    ("", "/x.yaml cannot be read .*Expected YAML dict"),
    ("include: nowhere\ntask: x", "/x.yaml cannot be read .*No such file .*nowhere"),
    ("task: \x00", "/x.yaml cannot be read .*control characters are not allowed"),
    ("task: 5", "/x.yaml: task has to be a name, it is 5"),
    ("group: x\ntask: sums", "/x.yaml: the group x has no list of tasks; .* says tag: instead"),
    ("task: sums", "sums is defined in .*/sums.yaml and in .*/x.yaml: rename one of them"),
]


@pytest.mark.parametrize("text, message", BROKEN)
def test_broken_files_are_named_though_nobody_asked_for_them(own, text, message):
    write(own, x=text)
    with pytest.raises(ConfigError, match=f"^include_path: .*{message}") as caught:
        load(own, "prose")
    assert "\n" not in str(caught.value)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"colour": "red"}, "unexpected keyword argument 'colour'"),
    ({"output_type": "guess"}, "invalid output_type 'guess'"),
    ({"test_split": "validation"}, "its documents have no split 'validation'"),
    ({"doc_to_text": "{{nothing}}"}, "UndefinedError: 'nothing' is undefined"),
    ({"dataset_kwargs": {"data_files": "sums.yaml"}}, "sums.yaml makes no task"),
    ({"dataset_path": "some/where", "dataset_kwargs": None}, "Couldn't reach 'some/where'"),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_a_definition_that_makes_no_task(own, no_network, capfd, change, message):
    write(own, sums=WRITES | change)
    with pytest.raises(DataError, match=rf"^sums: {own}/sums.yaml makes no task \(.*") as caught:
        load(own, "sums")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_damaged_documents_are_one_line(own, caplog):
    """datasets logs what it found before it raises, to a stream of its own."""
    (own / "sums.jsonl").write_text('{"sum": \n{"result"}\n')
    logging.getLogger("datasets").addHandler(caplog.handler)
    try:
        with pytest.raises(DataError, match=r"makes no task \(ArrowInvalid: JSON parse error"):
            load(own, "sums")
    finally:
        logging.getLogger("datasets").removeHandler(caplog.handler)
    assert caplog.records == []


def test_what_would_end_the_evaluation_later(own, no_network):
    write(own, sums=WRITES | {"metric_list": [{"metric": "exactness"}]})
    with pytest.raises(ConfigError, match="sums asks for 'exactness', and there is no such metric"):
        load(own, "sums")
    write(own, sums={"group": "sums", "task": ["prose", "sums"]})
    with pytest.raises(ConfigError, match="the group sums contains itself"):
        load(own, "sums")


def test_a_folder_that_is_none_or_has_none(own, tmp_path):
    with pytest.raises(DataError, match=r"include_path: .*nowhere is not a folder"):
        load(tmp_path / "nowhere", "sums")
    for file in own.glob("*.yaml"):
        file.rename(file.with_suffix(".yml"))
    with pytest.raises(ConfigError, match=r"include_path: no file in .*own ends in \.yaml"):
        load(own, "sums")
