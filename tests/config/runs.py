"""A small training run with every file it needs, for tests to spoil."""

from __future__ import annotations

from pathlib import Path

RUN = {
    "num_layers": "24",
    "hidden_size": "1024",
    "num_attention_heads": "16",
    "seq_length": "512",
    "max_position_embeddings": "512",
    "pos_emb": "rotary",
    "optimizer": "{type: Adam, params: {lr: 3.0e-4, betas: [0.9, 0.95], eps: 1.0e-8}}",
    "min_lr": "3.0e-5",
    "train_iters": "100",
    "train_micro_batch_size_per_gpu": "4",
    "data_path": "data/text_document",
    "vocab_file": "data/vocab.json",
    "merge_file": "data/merges.txt",
    "save": "checkpoints",
    "load": "checkpoints",
    "checkpoint_factor": "50",
}


def make_files(folder: Path) -> None:
    """The dataset, tokenizer and checkpoint that RUN names; all of them empty."""
    for name in ("text_document.bin", "text_document.idx", "vocab.json", "merges.txt"):
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / name).touch()
    for step in ("global_step50", "global_step100"):
        (folder / "checkpoints" / step).mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("global_step100")


def write(path: Path, text: str | bytes, *, without: tuple[str, ...] = ()) -> None:
    """`text`, and behind it the keys of RUN that neither `text` nor `without` names."""
    if isinstance(text, bytes):
        path.write_bytes(text)
        return
    named = text.replace("-", "_")
    rest = [f"{k}: {v}" for k, v in RUN.items() if f"{k}:" not in named and k not in without]
    path.write_text("\n".join(filter(None, [text, *rest])) + "\n", encoding="utf-8")
