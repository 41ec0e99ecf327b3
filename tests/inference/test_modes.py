"""Files of prompts in, JSON Lines out; several replicas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from neox import log
from neox.errors import ConfigError, DataError
from neox.inference import modes
from neox.parallel.groups import initialize
from neox.parallel.topology import Topology
from tests.inference.fakes import VOCABULARY, ByteTokenizer, FakeModel, config, mixed

KEYS = ["context", "text", "length", "finished", "message", "duration_seconds"]


def run(settings, logits=mixed) -> list[dict]:
    """What the results file holds after a whole run in one process."""
    model = FakeModel(settings, logits)
    job = modes.prepare(settings, model.groups)
    modes.write_completions(model, ByteTokenizer(), settings, job)
    return [json.loads(line) for line in job.output.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\nthree\n")
    return path


@pytest.mark.parametrize(
    "content, prompt_end, expected",
    [
        (b"one\ntwo\n", "\n", ["one", "two"]),
        (b"one\ntwo", "\n", ["one", "two"]),
        (b"one\r\ntwo\r\n", "\n", ["one", "two"]),
        (b"\n\n one \n\n \t\ntwo\t \n", "\n", [" one", "two"]),
        ("naïve\n日本語 🎈\n".encode(), "\n", ["naïve", "日本語 🎈"]),
        (b"\xef\xbb\xbffrom Windows\r\n", "\n", ["from Windows"]),
        (b"a\nb\n###\n\nc\n###\n", "###", ["a\nb", "c"]),
        (b"a\nb\r\n---\r\nc", "\n---\n", ["a\nb", "c"]),
        (b"def f():\n  if x:\nEND\n  return\n    x\nEND", "END", [
            "def f():\n  if x:", "  return\n    x",
        ]),
        (b"END END a END", "END", [" a"]),
    ],
)  # fmt: skip
def test_prompts_of_a_file(tmp_path, content, prompt_end, expected):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert modes.read_prompts(path, prompt_end) == expected


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"no prompts in .*prompts\.txt"):
        modes.read_prompts(path, "\n")


def test_files_that_are_not_prompts_are_refused(tmp_path):
    binary = tmp_path / "weights.pt"
    binary.write_bytes(b"abc\xff\xfe")
    with pytest.raises(DataError, match="byte 3 is not UTF-8"):
        modes.read_prompts(binary, "\n")
    with pytest.raises(DataError, match=r"absent\.txt: No such file"):
        modes.read_prompts(tmp_path / "absent.txt", "\n")
    with pytest.raises(DataError, match="Is a directory"):
        modes.read_prompts(tmp_path, "\n")


def test_results_of_a_file(prompts):
    results = run(config(text_gen_type="input-file", sample_input_file=str(prompts)))
    assert [result["context"] for result in results] == ["one", "two", "three"]
    assert all(list(result) == KEYS for result in results)
    assert (prompts.parent / "prompts.txt.output.jsonl").exists()


def test_output_file_that_is_named_is_used(prompts):
    output = prompts.parent / "out.txt"
    output.write_text("of an earlier run")
    settings = config(
        text_gen_type="input-file", sample_input_file=str(prompts), sample_output_file=str(output)
    )
    assert len(run(settings)) == 3
    assert len(output.read_text().splitlines()) == 3
    assert sorted(path.name for path in prompts.parent.iterdir()) == ["out.txt", "prompts.txt"]


def test_unconditional_samples(tmp_path):
    settings = config(num_samples=4, temperature=1.0, sample_output_file=str(tmp_path / "s.txt"))
    results = run(settings)
    assert [result["context"] for result in results] == [""] * 4
    assert len({result["text"] for result in results}) == 4
    again = run(settings)
    assert [result["text"] for result in again] == [result["text"] for result in results]


def test_samples_do_not_depend_on_the_other_prompts(prompts):
    settings = config(
        text_gen_type="input-file", sample_input_file=str(prompts), temperature=0.9, top_k=20
    )
    before = run(settings)
    prompts.write_text("another\ntwo\nthree\n")
    after = run(settings)
    assert [r["text"] for r in before[1:]] == [r["text"] for r in after[1:]]
    assert before[0]["text"] != after[0]["text"]


def test_a_prompt_too_long_costs_its_own_result_only(prompts, capsys):
    prompts.write_text("one\n" + 70 * "x" + "\nthree\n")
    results = run(config(text_gen_type="input-file", sample_input_file=str(prompts)))
    assert [result["length"] > 0 for result in results] == [True, False, True]
    assert "70 tokens" in results[1]["message"]
    assert "prompt 2: the prompt has 70 tokens" in capsys.readouterr().err


def test_finished_results_survive_a_crash(prompts):
    def crashes(history: list[int]) -> torch.Tensor:
        if bytes(history[:5]) == b"three":
            raise RuntimeError("power cut")
        return mixed(history)

    with pytest.raises(RuntimeError, match="power cut"):
        run(
            config(
                text_gen_type="input-file", sample_input_file=str(prompts), generate_batch_size=2
            ),
            crashes,
        )
    lines = (prompts.parent / "prompts.txt.output.jsonl").read_text().splitlines()
    assert [json.loads(line)["context"] for line in lines] == ["one", "two"]


@pytest.mark.parametrize(
    "output, reason",
    [("absent/out.txt", "there is no folder .*absent"), (".", "it is a folder")],
)
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, output, reason):
    settings = config(sample_output_file=str(tmp_path / output))
    with pytest.raises(DataError, match=reason):
        modes.prepare(settings, FakeModel(settings).groups)


def test_a_full_disk_is_a_users_error(prompts):
    settings = config(
        text_gen_type="input-file", sample_input_file=str(prompts), sample_output_file="/dev/full"
    )
    with pytest.raises(DataError, match="cannot write the results to /dev/full: No space left"):
        run(settings)


def test_the_prompts_are_never_overwritten(prompts):
    settings = config(
        text_gen_type="input-file", sample_input_file=str(prompts), sample_output_file=str(prompts)
    )
    with pytest.raises(ConfigError, match="holds the prompts"):
        modes.prepare(settings, FakeModel(settings).groups)
    assert prompts.read_text() == "one\ntwo\nthree\n"


def test_preparing_leaves_earlier_results_alone(prompts):
    output = prompts.parent / "prompts.txt.output.jsonl"
    output.write_text("of an earlier run")
    settings = config(text_gen_type="input-file", sample_input_file=str(prompts))
    modes.prepare(settings, FakeModel(settings).groups)
    assert output.read_text() == "of an earlier run"


def on_two_replicas(rank: int, settings, fail: bool) -> tuple[list[tuple[int, ...]], str]:
    log.set_rank(rank)
    groups = initialize(Topology(dp=2), "gloo", torch.device("cpu"))
    model = FakeModel(settings, groups=groups)
    if fail:
        try:
            modes.prepare(settings, groups)
        except DataError as error:
            return [], str(error)
    job = modes.prepare(settings, groups)
    modes.write_completions(model, ByteTokenizer(), settings, job)
    return model.shapes, ""


def test_replicas_share_the_prompts_and_one_rank_writes(world, prompts):
    settings = config(
        text_gen_type="input-file",
        sample_input_file=str(prompts),
        temperature=1.0,
        maximum_tokens=5,
        return_logits=True,
    )
    alone = run(settings)
    shapes = [answer[0] for answer in world.run(2, on_two_replicas, settings, False)]
    assert [sum(rows for rows, _ in calls) for calls in shapes] == [10, 5]
    output = prompts.parent / "prompts.txt.output.jsonl"
    together = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(result["logits"][0]) for result in together] == [VOCABULARY] * 3
    for result in alone + together:
        del result["duration_seconds"]
    assert together == alone


def test_every_rank_learns_that_the_prompts_are_missing(world, tmp_path):
    settings = config(text_gen_type="input-file", sample_input_file=str(tmp_path / "absent.txt"))
    said = [answer[1] for answer in world.run(2, on_two_replicas, settings, True)]
    assert "absent.txt" in said[0] and said[0] == said[1]
