"""tools/checkpoint.py merge, and convert --adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.testing import assert_close

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.peft import write_adapters
from tests.checkpoint.hf_folders import their_logits
from tests.checkpoint.peft_folders import our_logits, random_adapters
from tests.models import config_of, tokens, write_model
from tools import checkpoint as tool

CLOSE = {"rtol": 0.0, "atol": 1e-5}


def test_merge_and_convert_write_what_base_and_adapters_compute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = write_model(tmp_path / "base", 3)
    (step / "forward_pass.json").write_text("{}")  # what the base computes, not its adapters
    config = config_of()
    adapters = random_adapters(config, head=True, biases=True, norms=True)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapters(adapter, config, adapters, None)
    expected = our_logits(Checkpoint.open(tmp_path / "base"), config, adapters, tokens())

    def run(*words: str) -> int:
        return tool.main([*words, "--adapter", str(adapter)])

    base, neox, hf, back = (str(tmp_path / name) for name in ("base", "neox", "hf", "back"))
    assert run("merge", "--load", base, "--output", neox, "--model_parallel_size", "2") == 0
    assert run("convert", base, "--to", "transformers", "--output", hf) == 0
    merged = Checkpoint.open(Path(neox))
    assert (merged.tp, merged.iteration) == (2, 3)
    assert not (merged.folder / "forward_pass.json").exists()
    assert_close(our_logits(merged, config, None, tokens()), expected, **CLOSE)
    assert_close(their_logits(Path(hf), tokens()), expected, **CLOSE)

    plain = str(tmp_path / "plain")
    assert tool.main(["convert", base, "--to", "transformers", "--output", plain]) == 0
    assert run("merge", "--load", plain, "--output", back) == 0
    found = our_logits(Checkpoint.open(Path(back)), config, None, tokens())
    assert_close(found, expected, **CLOSE)

    capsys.readouterr()
    (adapter / "adapter_config.json").unlink()
    assert run("merge", "--load", base, "--output", str(tmp_path / "none")) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: adapter: ") and "adapter_config.json is missing" in said.err
    assert not (tmp_path / "none").exists()
