"""generate.py on a transformers folder of GPT-J: no key of the architecture is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests import small_tokenizer
from tests.checkpoint.hf_folders import THEIRS, make

DEEPY = Path(__file__).parents[2] / "deepy.py"
PROMPT = "It was"


def test_a_folder_generates_what_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make(tmp_path / "gpt-j", **THEIRS["gpt_j"] | {"n_positions": 64})
    tokenizer = small_tokenizer.train()
    (tmp_path / "mine.yml").write_text("load: gpt-j\nmaximum_tokens: 20\n")
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n")
    run = subprocess.run(
        [sys.executable, DEEPY, "generate.py", "mine.yml", "-i", "prompts.txt", "-o", "out.jsonl"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (run.returncode, run.stderr) == (0, "")
    (result,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    model = AutoModelForCausalLM.from_pretrained(folder)
    # Their 288 rows have 8 that pad the vocabulary.
    ids = model.generate(
        torch.tensor([tokenizer.encode(PROMPT).ids]),
        max_new_tokens=20,
        do_sample=False,
        suppress_tokens=list(range(tokenizer.get_vocab_size(), 288)),
        eos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        pad_token_id=0,
    )
    assert result["context"] == PROMPT and result["text"]
    new = ids[0, len(tokenizer.encode(PROMPT).ids) :].tolist()
    assert result["text"] == tokenizer.decode([i for i in new if i != 0], skip_special_tokens=False)
