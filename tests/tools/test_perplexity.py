"""tools/perplexity.py against the model's own logits, window by window."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neox.checkpoint.directory import write_checkpoint
from neox.checkpoint.neox import save_layers
from neox.config import from_dict
from neox.config.architecture import architecture
from neox.evaluation.perplexity import windows
from neox.inference.load import load_model
from neox.model.gpt import build_layers, layers
from neox.model.init import initialize
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import load_tokenizer
from tests import small_tokenizer
from tests.models import BASE, config_of
from tools import perplexity

LENGTH = 16  # seq_length
VALUES = BASE | {"hidden_size": 64, "init_method": "normal", "init_method_std": 0.3}
VOCABULARY = 280
DOCUMENTS = [small_tokenizer.TEXT * 3, "", "wisdom", "It was the age of foolishness. " * 4]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its tokenizer, a model.yml for two processes, texts.jsonl."""
    folder = tmp_path_factory.mktemp("model")
    config, single = config_of(**VALUES), ProcessGroups.single()
    stage = build_layers(
        layers(config, VOCABULARY, torch.float32, single),
        lambda module, layer: initialize(module, layer, config, 1, single),
    )
    write_checkpoint(
        folder,
        1,
        lambda place: save_layers(place, stage, single),
        {"small.yml": "{}"},
        single,
        grid={"tp": 1, "pp": 1, "dp": 1},
        padded_vocab_size=VOCABULARY,
        architecture=architecture(config),
    )
    values = VALUES | {"tokenizer_type": "HFTokenizer", "load": str(folder), "num_gpus": 2}
    values |= {"vocab_file": str(small_tokenizer.write(folder)), "model_parallel_size": 2}
    (folder / "model.yml").write_text(json.dumps(values))
    lines = [json.dumps({"text": text}) + "\n" for text in DOCUMENTS]
    (folder / "texts.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch, capsys) -> Run:
    """Runs `perplexity.py model.yml` and more words: status, standard output, standard error."""
    monkeypatch.chdir(folder)

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = perplexity.main(["model.yml", *words])
        return (status, *capsys.readouterr())

    return call


def by_hand(folder: Path, stride: int, **values: object) -> tuple[float, int]:
    """Loss and tokens of the texts, from logits over each window."""
    given = json.loads((folder / "model.yml").read_text()) | {"model_parallel_size": 1} | values
    model = load_model(
        from_dict(given | {"num_gpus": 1}), ProcessGroups.single(), tokens=VOCABULARY
    )
    tokenizer = load_tokenizer("HFTokenizer", str(folder / "tokenizer.json"))
    total, count = 0.0, 0
    for document in DOCUMENTS:
        text = torch.tensor([tokenizer.eod, *tokenizer.tokenize(document)])
        done = 1
        while done < len(text):
            stop = min(done + (LENGTH if done == 1 else stride), len(text))
            start = max(0, stop - 1 - LENGTH)
            logits_SV = model(text[None, start : stop - 1])[0]
            loss_S = torch.nn.functional.cross_entropy(
                logits_SV.double(), text[start + 1 : stop], reduction="none"
            )
            total += loss_S[done - 1 - start :].sum().item()
            count += stop - done
            done = stop
    return total / count, count


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 24, 100])
def test_windows_score_every_token_once_with_context(size: int, stride: int) -> None:
    tokens = list(range(100, 100 + size))
    made = list(windows(tokens, 0, LENGTH, stride))
    assert [token for _, scored in made for token in scored] == tokens
    for number, (context, scored) in enumerate(made):
        whole = [0, *tokens]
        start = whole.index(scored[0])
        assert context == whole[start - len(context) : start]
        assert len(context) + len(scored) - 1 <= LENGTH
        assert number == 0 or len(context) >= LENGTH - stride


@pytest.mark.parametrize("words, stride", [((), 8), (("--stride", "5"), 5)])
def test_perplexity_is_that_of_the_logits(run: Run, folder: Path, words, stride: int) -> None:
    loss, tokens = by_hand(folder, stride)
    command = ("--text", "texts.jsonl", "--quantize", "none", "--json", "out.json", *words)
    status, out, err = run(*command)
    assert (status, err) == (0, "")
    result = json.loads((folder / "out.json").read_text())
    (row,) = result["results"]
    assert (result["tokens"], result["documents"], result["stride"]) == (tokens, 4, stride)
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    parameters = sum(math.prod(shape) for shape in shapes(folder))
    # Packed by sixteen rows, which may be more than the vocabulary has.
    assert 4 * parameters <= row["weight_bytes"] < 4.1 * parameters
    assert row["tokens_per_second"] > 0 and row["change_percent"] == 0
    assert f"texts.jsonl: {tokens} tokens in 4 documents" in out
    assert out.splitlines()[-1].split()[:2] == ["none", f"{row['perplexity']:.4f}"]


def shapes(folder: Path) -> list[torch.Size]:
    files = (folder / "global_step1").glob("layer_*.pt")
    return [t.shape for file in files for t in torch.load(file, weights_only=True).values()]


def test_eight_bits_are_compared_with_the_whole_weights(run: Run, folder: Path) -> None:
    status, out, err = run("--text", "texts.jsonl", "--json", "out.json")
    assert (status, err) == (0, "")
    rows = json.loads((folder / "out.json").read_text())["results"]
    assert [row["quantize"] for row in rows] == ["none", "int8", "int4"] == list(perplexity.WAYS)
    sizes = [row["weight_bytes"] for row in rows]
    assert sizes[0] > 3 * sizes[1] and sizes[1] > 1.5 * sizes[2]
    change = [row["change_percent"] for row in rows]
    assert change[0] == 0 and 0 < abs(change[1]) < 5 and abs(change[1]) < abs(change[2])
    assert f"{change[2]:+.3f} %" in out


def test_load_in_8bit_is_measured_as_it_is(run: Run, folder: Path) -> None:
    loss, _ = by_hand(folder, 8, load_in_8bit=True)
    words = ("--text", "texts.jsonl", "--set", "load_in_8bit=true", "--json", "out.json")
    status, _, err = run(*words, "--quantize", "none")
    assert (status, err) == (0, "")
    (row,) = json.loads((folder / "out.json").read_text())["results"]
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    status, _, err = run(*words)
    assert status == 2 and "load_in_8bit is true" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (("--text", "absent.txt"), "input absent.txt does not exist"),
        (("--text", "empty.txt"), "empty.txt holds no text to score"),
        (("--text", "texts.jsonl", "--jsonl-keys", "content"), 'texts.jsonl:1: no key "content"'),
        (("--text", "texts.jsonl", "--stride", "17"), "--stride is 17, but it must be from 1 to"),
        (("--text", "texts.jsonl", "--quantize", "int3"), 'quantize is "int3", but it must be one'),
        (("--text", "texts.jsonl", "--quantize", "none,int3"), 'quantize is "int3", but it must'),
        (("--text", "texts.jsonl", "--quantize", ","), "--quantize names none of none"),
        (("--text", "texts.jsonl", "--set", "load=nowhere"), 'load is "nowhere"'),
        (
            ("--text", "texts.jsonl", "--quantize=none", "--json", "/dev/full/a"),
            "--json: /dev/full",
        ),
    ],
)
def test_what_is_wrong_is_one_line(run: Run, folder: Path, words, message: str) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "empty.jsonl").write_text("")
    status, _, err = run(*words)
    assert status == 2 and message in err and err.count("\n") == 1
