"""What `make demo` is made of, without its minutes: the corpus, the tokenizer, steps, summary."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import tokenizers

from neox.config import load_config
from tools import demo, demo_corpus, train_tokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's corpus, tokenizer and tokens, made by its own commands."""
    folder = tmp_path_factory.mktemp("demo")
    tools = {"demo_corpus": demo_corpus, "train_tokenizer": train_tokenizer}
    for step in demo.STEPS[:2]:
        _, tool, *arguments = step.command.replace("demo/", f"{folder}/").split()
        assert tools[Path(tool).stem].main(arguments) == 0
    return folder


def test_the_corpus_is_pythons_own_documentation(prepared: Path) -> None:
    documents = demo.read_jsonl(prepared / "corpus.jsonl")
    assert len(documents) > 50
    assert sum(len(document["text"]) for document in documents) > 300_000
    assert any("with_stmt" in document["text"] for document in documents)


def test_the_tokenizer_gives_every_text_back(prepared: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(prepared / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 512
    assert [tokenizer.id_to_token(i) for i in (0, 1)] == ["<|endoftext|>", "<|padding|>"]
    documents = [document["text"] for document in demo.read_jsonl(prepared / "corpus.jsonl")]
    for text in (*documents, "  \t\n caf\u00e9 \u4f60\u597d \U0001f600 "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"txt": "b"}\n', 'corpus.jsonl:2: no key "text"'),
        ("not JSON\n", "not JSON"),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, content: str, message: str
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(content)
    output = tmp_path / "tokenizer.json"
    arguments = ["--input", str(corpus), "--vocab-size", "300", "--output", str(output)]
    assert train_tokenizer.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_the_configuration_is_the_grid_that_the_demo_promises() -> None:
    config = load_config([REPOSITORY / "configs/demo.yml"])
    assert (config.tp, config.pp, config.dp) == (2, 2, 1)
    assert config.gpt_j_residual and config.no_weight_tying and config.pos_emb == "rotary"
    assert config.train_iters % config.checkpoint_factor == 0
    made_there = [config.data_path, config.vocab_file, config.save, config.load, config.log_dir]
    assert all(Path(path).parts[0] == str(demo.OUTPUT) for path in made_there)


def test_the_steps_name_files_that_exist() -> None:
    for step in demo.STEPS:
        for word in step.command.split():
            if re.match(r"(\./deepy|tools/|configs/)", word):
                assert (REPOSITORY / word).is_file(), step


def test_a_failing_step_stops_the_demo_and_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    never = tmp_path / "never"
    steps = [
        demo.Step("first", "Say hello", "echo hello"),
        demo.Step("second", "Fail", "exit 3"),
        demo.Step("third", "Never run", f"touch {never}"),
    ]
    status, seconds = demo.run_steps(steps)
    said = capfd.readouterr()
    assert status == 3
    assert list(seconds) == ["first", "second"]
    assert "[1/3] Say hello\n$ echo hello\nhello\n" in said.out
    assert "stopped at step 2, second: its command ended with status 3" in said.err
    assert not never.exists()


def test_a_step_that_a_signal_ends_has_failed() -> None:
    assert demo.Step("killed", "Die", "kill -9 $$").run() == 128 + 9


def test_the_summary_says_what_was_made(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    rows = [{"iteration": i, "train/lm_loss": 6.0 if i < 380 else 2.5} for i in range(400)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "logs/metrics.jsonl").write_text(lines)
    (tmp_path / "samples.jsonl").write_text('{"context": "A list", "text": " is\\nmutable"}\n')
    (tmp_path / "lambada_piqa_eval_results_1.json").write_text("{}")

    said = demo.summary(tmp_path, {"training": 61.4, "plotting": 1.2})

    assert "Done in 63 s: training 61 s, plotting 1 s." in said
    assert "from 6.00 to 2.50" in said
    assert "  |  is\n  | mutable\n" in said
    for name in ("checkpoints", "loss.png", "lambada_piqa_eval_results_1.json"):
        assert str(tmp_path / name) in said


def pins(name: str) -> dict[str, str]:
    """Package -> version of a requirements file; every line is an exact pin."""
    found = {}
    for line in (REPOSITORY / "requirements" / name).read_text().splitlines():
        line = line.partition("#")[0].partition(";")[0].strip()
        if line and not line.startswith(("-r ", "-c ")):
            package, version = line.split("==")
            found[re.sub(r"[-_.]+", "-", package).lower()] = version
    return found


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_pinned_and_locked(name: str) -> None:
    locked = pins("lock.txt")
    assert {package: locked.get(package) for package in pins(name)} == pins(name)


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    """`make install` asks before it makes anything."""
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.8.10 || exit 1\n')
    old.chmod(0o755)
    makefile = tmp_path / "Makefile"
    makefile.write_text((REPOSITORY / "Makefile").read_text())
    (tmp_path / "requirements").symlink_to(REPOSITORY / "requirements")
    done = subprocess.run(
        ["make", "install", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error: Python 3.8.10 is too old" in done.stderr
    assert not (tmp_path / ".venv").exists()
