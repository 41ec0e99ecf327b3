"""One model in the formats of all the programs that benchmarks compare.

The weights are random: `synthesize` writes them as NeoX layer files, with biases and norms that are
not trivial, and the other formats are made from those, so that all compute the same.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.contestants import THREADS
from benchmarks.evaluate import train_tokenizer
from neox import log

if TYPE_CHECKING:
    import gguf
    from torch import Tensor

SEQUENCE = 2048
ROTARY = 0.25
END = "<|endoftext|>"
INSTALL = ".venv/bin/pip install -r requirements/requirements-peers.txt"

# Files of llama.cpp by their precision, and the number of its type in `enum llama_ftype`.
GGUF_TYPES = {"fp32": ("f32", 0), "int8": ("q8_0", 7), "int4": ("q4_0", 2)}


@dataclass(frozen=True)
class Shape:
    """A GPT-NeoX model."""

    name: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int = 50304

    @property
    def products(self) -> int:
        """Weights that a token is multiplied with in the blocks: qkv, dense, and the MLP's two."""
        return 12 * self.layers * self.hidden**2

    @property
    def read(self) -> int:
        """Weights that a decoded token needs: those, and the output projection's.

        Of the embedding it needs one row; biases and norms are a thousandth.
        """
        return self.products + self.vocabulary * self.hidden


SHAPE_410M = Shape("410M", 24, 1024, 16)
SHAPE_160M = Shape("160M", 12, 768, 12)
TINY = Shape("tiny", 4, 256, 4, vocabulary=8192)


def vocabulary(folder: Path) -> list[str]:
    """The tokens by their number, as the tokenizer's file has them."""
    tokens: dict[str, int] = json.loads(tokenizer_of(folder).read_text())["model"]["vocab"]
    return sorted(tokens, key=tokens.__getitem__)


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def values(shape: Shape, folder: Path) -> dict[str, Any]:
    """The configuration of the model that `write` puts into `folder`, in fp32."""
    return {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "seq_length": SEQUENCE,
        "max_position_embeddings": SEQUENCE,
        "pos_emb": "rotary",
        "rotary_pct": ROTARY,
        "gpt_j_residual": True,
        "no_weight_tying": True,
        "precision": "fp32",
        # So large that attention is sharp: a wrong position has to change the tokens.
        "init_method_std": (2 / shape.hidden) ** 0.5,
        "tokenizer_type": "HFTokenizer",
        "vocab_file": str(tokenizer_of(folder)),
        "load": str(folder / "neox"),
    }


def tokenizer_of(folder: Path) -> Path:
    return folder / "tokenizer.json"


def transformers_of(folder: Path) -> Path:
    return folder / "transformers"


def ctranslate2_of(folder: Path, precision: str) -> Path:
    return folder / f"ctranslate2-{precision}"


def gguf_of(folder: Path, precision: str) -> Path:
    return folder / f"{GGUF_TYPES[precision][0]}.gguf"


def write(
    shape: Shape, folder: Path, *, ctranslate2: Iterable[str] = (), gguf: Iterable[str] = ()
) -> None:
    """Write the model as ours and transformers', and in these precisions of the peers.

    Another process does it, so that none of it is left in this one's memory.
    """
    steps: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(_write_ours, (shape, folder))]
    steps += [(_write_ctranslate2, (folder, precision)) for precision in ctranslate2]
    if gguf := tuple(gguf):
        steps.append((_write_gguf, (shape, folder)))
        steps += [
            (_quantize_gguf, (folder, precision)) for precision in gguf if precision != "fp32"
        ]
    spawn = multiprocessing.get_context("spawn")
    with (
        log.progress(total=len(steps), desc="writing models", unit=" formats") as bar,
        ProcessPoolExecutor(1, spawn, initializer=log.quiet_third_parties) as process,
    ):
        for step, arguments in steps:
            process.submit(step, *arguments).result()
            bar.update(1)


def _write_ours(shape: Shape, folder: Path) -> None:
    from neox.checkpoint.hf.export import export
    from neox.checkpoint.neox import Checkpoint
    from neox.checkpoint.synthesize import synthesize
    from neox.config import from_dict
    from neox.tokenizer import build_tokenizer

    _write_tokenizer(shape, folder)
    config = from_dict(values(shape, folder))
    synthesize(folder / "neox", config, shape.vocabulary, legacy_names=False)
    checkpoint = Checkpoint.open(folder / "neox", config=config)
    export(checkpoint, config, transformers_of(folder), tokenizer=build_tokenizer(config))


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    """A trained tokenizer of as many tokens as the model has rows, so that each stands for a text.

    No merge leads to those beyond the trained ones: they are never read, only written.
    """
    path = train_tokenizer(folder)
    tokenizer = json.loads(path.read_text())
    tokens = tokenizer["model"]["vocab"]
    for i in range(len(tokens), shape.vocabulary):
        tokens[f"Ġtoken{i}"] = i
    path.write_text(json.dumps(tokenizer))


def _write_ctranslate2(folder: Path, precision: str) -> None:
    import transformers
    from ctranslate2.converters.transformers import GPTNeoXLoader

    transformers.utils.logging.disable_progress_bar()
    model = transformers.GPTNeoXForCausalLM.from_pretrained(
        transformers_of(folder), local_files_only=True
    )
    # Its converter knows these by the names of transformers 4.
    model.config.rotary_pct = ROTARY
    model.embed_out = model.lm_head
    spec = GPTNeoXLoader().get_model_spec(model)
    spec.register_vocabulary(vocabulary(folder))
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = END
    spec.validate()
    spec.optimize(quantization={"fp32": "float32", "int8": "int8"}[precision])
    output = ctranslate2_of(folder, precision)
    output.mkdir()
    spec.save(str(output))


def _write_gguf(shape: Shape, folder: Path) -> None:
    import gguf
    from safetensors import safe_open

    writer = gguf.GGUFWriter(gguf_of(folder, "fp32"), "gptneox", use_temp_file=False)
    writer.add_context_length(SEQUENCE)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(4 * shape.hidden)
    writer.add_rope_dimension_count(int(ROTARY * shape.hidden // shape.heads))
    writer.add_head_count(shape.heads)
    writer.add_parallel_residual(True)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(GGUF_TYPES["fp32"][1])
    _add_tokenizer(writer, folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPTNEOX, shape.layers)
    with safe_open(transformers_of(folder) / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            tensor = file.get_tensor(name)
            if "query_key_value" in name:
                tensor = _apart(tensor, shape.heads)
            if name == "lm_head.weight":
                name = "embed_out.weight"  # its name in transformers 4
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(found, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _apart(tensor: Tensor, heads: int) -> Tensor:
    """[heads, (q, k, v), ...] in the first dim as (q, k, v), each of all heads."""
    return tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    import gguf

    tokens = vocabulary(folder)
    merges = json.loads(tokenizer_of(folder).read_text())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    types = [gguf.TokenType.NORMAL] * len(tokens)
    end = tokens.index(END)
    types[end] = gguf.TokenType.CONTROL
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def _quantize_gguf(folder: Path, precision: str) -> None:
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = THREADS
    parameters.ftype = GGUF_TYPES[precision][1]
    source, target = (str(gguf_of(folder, name)).encode() for name in ("fp32", precision))
    status = llama_cpp.llama_model_quantize(source, target, parameters)
    assert status == 0, f"llama.cpp could not write {target.decode()}"
