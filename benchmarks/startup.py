"""What one answer costs beyond importing torch: `./deepy.py generate.py` on a small model.

Every round runs both programs, one right after the other and in changing order, so that what else
the machine does falls on both. over_import_torch = (seconds of generate.py - seconds that the
tokens themselves took) / (seconds of `python -c "import torch"`), the median over the rounds.

    python benchmarks/startup.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from neox.atomic import write_text  # noqa: E402

TARGET = 2.0

MODEL = {
    "num_layers": 6,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "seq_length": 512,
    "max_position_embeddings": 512,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "gpt_j_residual": True,
    "no_weight_tying": True,
    "precision": "fp32",
    "tokenizer_type": "HFTokenizer",
    "text_gen_type": "unconditional",
    "maximum_tokens": 32,
}


def make_tokenizer(path: Path) -> int:
    """A byte-level tokenizer of a realistic kind; returns the size of its vocabulary."""
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        topics.values(), vocab_size=2000, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()


def make_model(folder: Path) -> Path:
    """Write a tokenizer, a checkpoint of random weights and their YAML; return the YAML's path."""
    import torch

    from neox.checkpoint.folders import step_folder
    from neox.checkpoint.neox import save_layer
    from neox.config import from_dict
    from neox.model.gpt import layers
    from neox.model.init import initialize
    from neox.model.layout import pad_vocab_size
    from neox.parallel.groups import ProcessGroups

    values = MODEL | {
        "vocab_file": str(folder / "tokenizer.json"),
        "load": str(folder / "checkpoint"),
        "sample_output_file": str(folder / "samples.jsonl"),
        "log_dir": str(folder / "logs"),
    }
    vocab_size = make_tokenizer(folder / "tokenizer.json")
    config = from_dict(values)
    groups = ProcessGroups.single()
    target = step_folder(folder / "checkpoint", 0)
    target.mkdir(parents=True)
    for layer in layers(config, pad_vocab_size(vocab_size, 128, 1), torch.float32, groups):
        if layer.has_file:
            module = layer.build()
            initialize(module, layer, config, config.seed, groups)
            save_layer(target, layer, module, groups)
    (folder / "checkpoint" / "latest").write_text(target.name)
    path = folder / "small.yml"
    path.write_text(json.dumps(values))
    return path


def seconds(*command: str) -> float:
    """How long a program runs; its output is shown only when it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    took = time.perf_counter() - start
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return took


def measure(config: Path, rounds: int) -> list[tuple[float, float, float]]:
    """For each round the seconds of generate.py, of its tokens alone, and of importing torch."""
    programs = {
        "generate": (sys.executable, "deepy.py", "generate.py", str(config)),
        "import": (sys.executable, "-c", "import torch"),
    }
    for command in programs.values():  # files into memory, bytecode onto the disk
        seconds(*command)
    results = config.parent / "samples.jsonl"
    measured = []
    for i in range(rounds):
        order = list(programs) if i % 2 else list(reversed(programs))
        took = {name: seconds(*programs[name]) for name in order}
        tokens = sum(
            json.loads(line)["duration_seconds"] for line in results.read_text().splitlines()
        )
        measured.append((took["generate"], tokens, took["import"]))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 15")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="neox-startup-") as folder:
        measured = measure(make_model(Path(folder)), 3 if arguments.quick else 15)
    generate, tokens, torch_import = (
        statistics.median(column) for column in zip(*measured, strict=True)
    )
    ratios = [(whole - own) / base for whole, own, base in measured]
    ratio = statistics.median(ratios)

    print(f"medians of {len(measured)} rounds")
    print(f"  generate.py, one process            {generate:6.2f} s")
    print(f"    of which the {MODEL['maximum_tokens']} tokens           {tokens:6.2f} s")
    print(f"  python -c 'import torch'            {torch_import:6.2f} s")
    print("  generate.py without its tokens, over importing torch")
    print(f"    {ratio:.2f} (from {min(ratios):.2f} to {max(ratios):.2f}; target {TARGET})")
    if arguments.json:
        write_text(arguments.json, json.dumps({"over_import_torch": ratio}) + "\n")


if __name__ == "__main__":
    main()
