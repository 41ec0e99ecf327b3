"""Models for tests of evaluation: a real one, one of transformers', one that knows it all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neox.config import NeoXConfig, from_dict
from neox.inference.cache import CacheView, KVCache
from neox.inference.stages import InferenceModel
from neox.model.gpt import Layer, build_layers, layers
from neox.model.init import initialize
from neox.model.packing import Packing
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import Tokenizer, load_tokenizer
from tests import small_tokenizer
from tests.inference.fakes import histories

SEQ_LENGTH = 48
VOCABULARY = 288  # the small tokenizer's 280, padded


def config(**values: Any) -> NeoXConfig:
    model = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": SEQ_LENGTH,
        "max_position_embeddings": SEQ_LENGTH,
        "pos_emb": "rotary",
        "rotary_pct": 0.25,
        "no_weight_tying": True,
        "precision": "fp32",
        "tokenizer_type": "CharLevelTokenizer",
        "train_micro_batch_size_per_gpu": 4,
    }
    return from_dict(model | values)


def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer("HFTokenizer", str(small_tokenizer.write(folder)))


def random_model(groups: ProcessGroups | None = None) -> InferenceModel:
    """A whole model with random weights, large enough for its answers to differ."""
    groups = groups or ProcessGroups.single()
    single = ProcessGroups.single()  # a replica is one process here
    settings = config()

    def fill(module: nn.Module, layer: Layer) -> None:
        initialize(module, layer, settings, 1234, single)
        for parameter in module.parameters():
            parameter.data.mul_(3)

    stage = build_layers(layers(settings, VOCABULARY, torch.float32, single), fill)
    return InferenceModel(settings, groups, stage, VOCABULARY, torch.float32)


class Stateless:
    """What the fakes share: one process, and as cache the tokens so far."""

    device = torch.device("cpu")
    is_source = True

    def __init__(self, settings: NeoXConfig | None = None) -> None:
        self.config = settings or config()
        self.groups = ProcessGroups.single()
        self.rows: list[list[int]] = []  # what it was asked

    def logits(self, tokens_BS: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(
        self, tokens_BS: Tensor, cache: CacheView | None = None, *, logits: str = "all"
    ) -> Tensor:
        self.rows += tokens_BS.tolist()
        first = -1 if logits == "last" else -tokens_BS.shape[1]
        rows = histories(tokens_BS, cache)
        return torch.cat([self.logits(torch.tensor([row]))[:, first:] for row in rows])

    logit_rows = 5

    def hidden(self, tokens_S: Tensor, packing: Packing, wanted_U: Tensor) -> Tensor:
        """Logits, [U, V]: each text by itself, up to a wanted token that is in front of none."""
        done: dict[int, Tensor] = {}
        for token in sorted(wanted_U.tolist(), key=lambda i: -int(packing.positions_S[i])):
            if token not in done:
                path = path_of(packing, token)
                self.rows.append(tokens_S[path].tolist())
                done |= dict(zip(path, self.logits(tokens_S[path][None])[0], strict=True))
        return torch.stack([done[token] for token in wanted_U.tolist()])

    def target_scores(self, hidden_UH: Tensor, rows_K: Tensor, targets_K: Tensor) -> Tensor:
        log_probabilities_KV = hidden_UH[rows_K].double().log_softmax(-1)
        scores_K = log_probabilities_KV.gather(1, targets_K[:, None])[:, 0]
        return torch.stack([scores_K, (log_probabilities_KV.argmax(-1) == targets_K).double()], 1)

    def new_cache(self, rows: int, max_length: int) -> KVCache:
        return KVCache(1, rows, 1, max_length, 1, torch.float32, "cpu")

    def select(self, adapter: str | None) -> None:
        assert adapter is None

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor


def path_of(packing: Packing, token: int) -> list[int]:
    """The tokens of a row that one of them sees, itself the last."""
    group, place = divmod(int(packing.places_S[token]), packing.tokens_GL.shape[1])
    if packing.sees_GLL is None:
        return packing.tokens_GL[group, : place + 1].tolist()
    return packing.tokens_GL[group][packing.sees_GLL[group, place]].tolist()


class FromTransformers(Stateless):
    """A causal model of transformers behind InferenceModel's interface."""

    def __init__(self, model: Any, settings: NeoXConfig | None = None) -> None:
        super().__init__(settings)
        self.model = model

    @torch.inference_mode()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        return self.model(tokens_BS).logits


class Wise(Stateless):
    """Knows some texts by heart: after a part of one that is nowhere else, its next token."""

    def __init__(self, texts: Sequence[list[int]], settings: NeoXConfig | None = None) -> None:
        super().__init__(settings)
        self.texts = texts

    def logits(self, tokens_BS: Tensor) -> Tensor:
        logits_BSV = torch.zeros(*tokens_BS.shape, VOCABULARY)
        for row, logits_SV in zip(tokens_BS.tolist(), logits_BSV, strict=True):
            for text in self.texts:
                for i in range(min(len(text) - 1, len(row))):
                    if row[i] != text[i]:
                        break
                    logits_SV[i, text[i + 1]] += 20.0
        return logits_BSV
