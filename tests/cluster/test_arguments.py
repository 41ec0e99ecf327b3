"""The command line's grammar: the forms that people type, and what they are told when wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

import neox
from neox.cluster.arguments import DEFAULT_CONFIG, REPOSITORY, Arguments, parse
from neox.config import Override
from neox.errors import ConfigError


def override(key: str, value: object, flag: str) -> dict[str, Override]:
    return {key: Override(value, flag)}


TASKS = override("eval_tasks", ["lambada", "piqa"], "--eval_tasks")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "train.py -d configs 125M.yml local_setup.yml",
            Arguments("train", None, Path("configs"), (Path("125M.yml"), Path("local_setup.yml"))),
        ),
        (
            "train.py ./configs/20B.yml ./configs/local_cluster.yml",
            Arguments(
                "train",
                None,
                None,
                (Path("configs/20B.yml"), Path("configs/local_cluster.yml")),
            ),
        ),
        (
            "generate.py ./configs/20B.yml",
            Arguments("generate", None, None, (Path("configs/20B.yml"),)),
        ),
        (
            "generate.py ./configs/20B.yml -i prompt.txt -o sample_outputs.txt",
            Arguments(
                "generate",
                None,
                None,
                (Path("configs/20B.yml"),),
                override("sample_input_file", "prompt.txt", "-i")
                | override("sample_output_file", "sample_outputs.txt", "-o"),
            ),
        ),
        (
            "generate.py -d configs 125M local_setup text_generation",
            Arguments(
                "generate",
                None,
                Path("configs"),
                (Path("125M"), Path("local_setup"), Path("text_generation")),
            ),
        ),
        (
            "eval.py ./configs/20B.yml --eval_tasks lambada piqa",
            Arguments("evaluate", None, None, (Path("configs/20B.yml"),), TASKS),
        ),
        (
            "evaluate.py configs/tmp.yml --eval_tasks lambada --iteration 26000 "
            "--eval_results_prefix iteration_26000",
            Arguments(
                "evaluate",
                None,
                None,
                (Path("configs/tmp.yml"),),
                override("eval_tasks", ["lambada"], "--eval_tasks")
                | override("iteration", 26000, "--iteration")
                | override("eval_results_prefix", "iteration_26000", "--eval_results_prefix"),
            ),
        ),
        # No configuration file at all, after a flag that takes any number of words.
        ("evaluate.py --eval_tasks lambada piqa", Arguments("evaluate", None, overrides=TASKS)),
        ("train.py", Arguments("train", None)),
        # A configuration file among the tasks is a configuration file.
        (
            "evaluate.py --eval_tasks lambada configs/x.yml piqa",
            Arguments("evaluate", None, None, (Path("configs/x.yml"),), TASKS),
        ),
        ("evaluate.py --eval_tasks lambada,piqa", Arguments("evaluate", None, overrides=TASKS)),
        (
            "train.py a.yml -H hosts --wandb_group g --wandb_run_name r --wandb_team t",
            Arguments(
                "train",
                None,
                None,
                (Path("a.yml"),),
                override("hostfile", "hosts", "-H")
                | override("wandb_group", "g", "--wandb_group")
                | override("wandb_run_name", "r", "--wandb_run_name")
                | override("wandb_team", "t", "--wandb_team"),
            ),
        ),
        (
            "evaluate.py a.yml --num_fewshot 5 --limit 0.1",
            Arguments(
                "evaluate",
                None,
                None,
                (Path("a.yml"),),
                override("num_fewshot", 5, "--num_fewshot") | override("limit", 0.1, "--limit"),
            ),
        ),
        (
            "--dry_run train.py a.yml --conf_dir c b.yml",
            Arguments("train", None, Path("c"), (Path("a.yml"), Path("b.yml")), dry_run=True),
        ),
        (
            "train.py a.yml --set optimizer.params.lr=6e-4 --set train-iters=10 --iteration 1 "
            "--set iteration=2 --set prompt_end=@@",
            Arguments(
                "train",
                None,
                None,
                (Path("a.yml"),),
                override("iteration", 2, "--set")
                | override("optimizer.params.lr", 6e-4, "--set")
                | override("train_iters", 10, "--set")
                | override("prompt_end", "@@", "--set"),
            ),
        ),
    ],
)
def test_a_command_line_means(line: str, expected: Arguments) -> None:
    assert parse(line.split()) == expected


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("-d", "--conf_dir"),
        ("-i", "--sample_input_file"),
        ("-o", "--sample_output_file"),
        ("-H", "--hostfile"),
    ],
)
def test_long_and_short_flags_are_the_same(short: str, long: str) -> None:
    assert parse(["train.py", short, "x"]) == parse(["train.py", long, "x"])


def test_another_path_is_the_users_script(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    given = parse([str(script), "a.yml"])
    assert (given.entry_point, given.script) == (None, script)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "arguments are required: USER_SCRIPT"),
        ("trian.py a.yml", "no script trian.py; did you mean train.py?"),
        ("nothing.py a.yml", "no script nothing.py: there are train.py, generate.py"),
        ("train.py a.yml --iteratoin 3", "no flag --iteratoin; did you mean --iteration?"),
        ("evaluate.py a.yml --eval-tasks piqa", "no flag --eval-tasks; did you mean --eval_tasks?"),
        ("train.py a.yml --num-layers 3", "num_layers is a key .*: --set num_layers=VALUE"),
        ("train.py a.yml --verbose", "no flag --verbose; any key .* --set key=value"),
        ("train.py a.yml --iter 3", "no flag --iter; did you mean --iteration?"),
        ("train.py a.yml --iteration x", "--iteration: invalid int value: 'x'"),
        ("evaluate.py a.yml --limit x", "--limit: invalid number value: 'x'"),
        ("evaluate.py --eval_tasks a.yml", "name at least one task"),
        ("evaluate.py a.yml --eval_tasks", "--eval_tasks: expected at least one argument"),
        ("train.py a.yml --set lr", "--set lr: write --set key=value"),
        ("train.py a.yml --autotuning tune", "autotuner is not supported"),
    ],
)
def test_a_wrong_command_line_is_explained_in_one_line(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(line.split())
    assert "\n" not in str(caught.value)


def test_the_version_is_the_projects(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"neox {neox.__version__}\n"
    assert f'version = "{neox.__version__}"' in (REPOSITORY / "pyproject.toml").read_text()


def test_help_names_every_flag_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["-h"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert all(flag in text for flag in ("--set", "--eval_tasks", "--dry_run", "-H", "-i", "-o"))
    assert "./deepy.py train.py -d configs" in text


def test_the_default_configuration_is_the_20b() -> None:
    assert Path(__file__).parents[2] / "configs" / "20B.yml" == DEFAULT_CONFIG
