"""The oracle: GPT-NeoX written a second time, as plainly as possible, on whole tensors.

It shares no code with neox/. Attention is written out with explicit scores; positions are rotated
one pair at a time. `weights` maps "layer.name" to whole float tensors, layer as NeoX numbers it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_logits(config, weights: dict[str, Tensor], tokens_BS: Tensor) -> Tensor:
    """[B, S] token ids -> [B, S, V]."""
    x = weights["0.word_embeddings.weight"][tokens_BS]
    if config.pos_emb == "learned":
        x = x + weights["0.position_embeddings.weight"][: tokens_BS.shape[1]]
    for i in range(config.num_layers):
        layer = {
            name.split(".", 1)[1]: tensor
            for name, tensor in weights.items()
            if name.startswith(f"{i + 2}.")
        }
        x = _block(config, layer, x)
    last = {
        name.split(".", 1)[1]: tensor
        for name, tensor in weights.items()
        if name.startswith(f"{config.num_layers + 3}.")
    }
    x = _norm(config, last, "norm", x)
    head = weights.get(f"{config.num_layers + 4}.final_linear.weight")
    table = weights["0.word_embeddings.weight"] if head is None else head
    return x @ table.T + weights.get(f"{config.num_layers + 4}.final_linear.bias", 0.0)


def _block(config, w, x):
    first = _norm(config, w, "input_layernorm", x)
    shared = config.gpt_j_residual and config.gpt_j_tied
    second_name = "input_layernorm" if shared else "post_attention_layernorm"
    if config.gpt_j_residual:
        second = _norm(config, w, second_name, x)
        return x + _attention(config, w, first) + _mlp(config, w, second)
    x = x + _attention(config, w, first)
    return x + _mlp(config, w, _norm(config, w, second_name, x))


def _linear(w, name, x):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _norm(config, w, name, x):
    if config.norm == "rmsnorm":
        root = (x * x).mean(-1, keepdim=True).sqrt()
        return x / (root + config.rms_norm_epsilon) * w[f"{name}.scale"]
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    normed = centred / (variance + config.layernorm_epsilon).sqrt()
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]


def _attention(config, w, x):
    B, S, _ = x.shape
    heads = config.num_attention_heads
    kv_heads = config.num_kv_heads or heads
    size = config.hidden_size // heads
    qkv = _linear(w, "attention.query_key_value", x)
    if kv_heads == heads:
        q, k, v = (
            torch.stack(
                [qkv[..., (3 * h + part) * size : (3 * h + part + 1) * size] for h in range(heads)],
                1,
            )
            for part in range(3)
        )
    else:
        cuts = [heads * size, kv_heads * size, kv_heads * size]
        q, k, v = (
            part.view(B, S, -1, size).transpose(1, 2) for part in torch.split(qkv, cuts, dim=-1)
        )
        repeat = heads // kv_heads
        k = torch.stack([k[:, h // repeat] for h in range(heads)], 1)
        v = torch.stack([v[:, h // repeat] for h in range(heads)], 1)
    if config.pos_emb == "rotary":
        q, k = _rotate(config, q, size), _rotate(config, k, size)
    scores = q @ k.transpose(-1, -2) / math.sqrt(size)
    for i in range(S):
        for j in range(S):
            window = config.sliding_window_width
            if j > i or (window is not None and j < i - window):
                scores[:, :, i, j] = -math.inf
    out = scores.softmax(-1) @ v
    return _linear(w, "attention.dense", out.transpose(1, 2).reshape(B, S, heads * size))


def _rotate(config, x_BNSD, size):
    rotated = x_BNSD.clone()
    dims = int(size * config.rotary_pct)
    half = dims // 2
    for s in range(x_BNSD.shape[2]):
        for d in range(half):
            angle = s / config.rotary_emb_base ** (2 * d / dims)
            cos, sin = math.cos(angle), math.sin(angle)
            i, j = (2 * d, 2 * d + 1) if config.rotary_interleaved else (d, d + half)
            a, b = x_BNSD[:, :, s, i], x_BNSD[:, :, s, j]
            rotated[:, :, s, i] = a * cos - b * sin
            rotated[:, :, s, j] = b * cos + a * sin
    return rotated


def _mlp(config, w, x):
    inner = _linear(w, "mlp.linear1", x)
    name = config.activation
    if name in ("geglu", "reglu", "swiglu", "bilinear", "glu"):
        up, gate = inner[..., : inner.shape[-1] // 2], inner[..., inner.shape[-1] // 2 :]
        functions = {
            "geglu": _erf_gelu,
            "reglu": lambda t: t.clamp(min=0),
            "swiglu": lambda t: t / (1 + (-t).exp()),
            "bilinear": lambda t: t,
            "glu": lambda t: 1 / (1 + (-t).exp()),
        }
        inner = up * functions[name](gate)
    else:
        functions = {
            "gelu": _tanh_gelu if config.bias_gelu_fusion else _erf_gelu,
            "relu": lambda t: t.clamp(min=0),
            "softsign": lambda t: t / (1 + t.abs()),
            "swish": lambda t: t / (1 + (-t).exp()),
            "silu": lambda t: t / (1 + (-t).exp()),
            "mish": lambda t: t * torch.tanh((1 + t.exp()).log()),
        }
        inner = functions[name](inner)
    return _linear(w, "mlp.linear2", inner)


def _erf_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
