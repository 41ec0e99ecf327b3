"""Keys that must agree with one another, whatever the run is for."""

from __future__ import annotations

from neox.config.arithmetic import around, divisors, multiples_around, options
from neox.config.checks import Checks, Findings
from neox.config.config import NeoXConfig
from neox.config.values import listed, show

CHECKS = Checks()
DEFAULT_PARTITION = "type:transformer|mlp"
LAYER_KINDS = ("global", "flash")


@CHECKS.reading("hidden_size", "num_attention_heads")
def _heads_divide_width(config: NeoXConfig) -> Findings:
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        yield (
            "hidden_size",
            f"hidden_size is {width}, but it is not divisible by num_attention_heads ({heads}). "
            f"Use {listed(around(heads, divisors(width)))} heads, or a hidden_size of "
            f"{listed(multiples_around(width, heads))}.",
        )


@CHECKS.reading("num_kv_heads", "num_attention_heads")
def _kv_heads_divide_heads(config: NeoXConfig) -> Findings:
    heads, kv_heads = config.num_attention_heads, config.kv_heads
    if heads % kv_heads:
        yield (
            "num_kv_heads",
            f"num_kv_heads is {kv_heads}, but num_attention_heads ({heads}) is not divisible by "
            f"it. Use {options(kv_heads, divisors(heads))}.",
        )


@CHECKS.reading("max_position_embeddings", "seq_length")
def _positions_hold_sequence(config: NeoXConfig) -> Findings:
    positions, length = config.max_position_embeddings, config.seq_length
    if positions < length:
        yield (
            "max_position_embeddings",
            f"max_position_embeddings is {positions}, but seq_length is {length}. Raise it to "
            f"{length} or more, or shorten seq_length.",
        )


@CHECKS.reading("pos_emb", "rotary_pct", "hidden_size", "num_attention_heads")
def _rotary_dimensions_pair_up(config: NeoXConfig) -> Findings:
    if config.pos_emb != "rotary" or config.hidden_size % config.num_attention_heads:
        return
    dim, head = config.rotary_dim, config.head_dim
    if dim < 2 or dim % 2:
        yield (
            "rotary_pct",
            f"rotary_pct is {config.rotary_pct:g}, which rotates {dim} of a head's {head} "
            "dimensions, but they are rotated in pairs. Choose it so that rotary_pct x "
            f"{head} is even, such as {2 * max(1, dim // 2) / head:g}.",
        )


@CHECKS.reading("intermediate_size", "expansion_factor")
def _one_inner_width(config: NeoXConfig) -> Findings:
    if config.intermediate_size is not None and config.expansion_factor is not None:
        yield (
            "expansion_factor",
            f"expansion_factor is {config.expansion_factor:g}, but intermediate_size "
            f"({config.intermediate_size}) sets the inner width as well. Keep one of them.",
        )


@CHECKS.reading("onnx_safe", "bias_gelu_fusion")
def _one_gelu(config: NeoXConfig) -> Findings:
    if config.onnx_safe and config.bias_gelu_fusion:
        yield (
            "onnx_safe",
            "onnx_safe is true, which asks for GELU by erf, but bias_gelu_fusion is true, which "
            "asks for its tanh approximation. Keep one of them.",
        )


@CHECKS.reading("attention_config", "num_layers")
def _attention_covers_layers(config: NeoXConfig) -> Findings:
    name, layers = "attention_config", config.num_layers
    count = 0
    for item in config.attention_config or []:
        kinds, repeats = item if isinstance(item, list) and len(item) == 2 else (None, None)
        whole = isinstance(repeats, int) and not isinstance(repeats, bool) and repeats > 0
        if not (isinstance(kinds, list) and kinds and (whole or repeats == "all")):
            yield (
                name,
                f"{name} holds {show(item)}, but each item must be a list of layer kinds and "
                f'their repeats, such as [["global"], {layers}] or [["global"], "all"].',
            )
            return
        unknown = [kind for kind in kinds if kind not in LAYER_KINDS]
        if unknown:
            yield (
                name,
                f"{name} holds {show(unknown[0])}, which is not supported. Use "
                f"{listed(map(show, LAYER_KINDS))}, which are the same.",
            )
            return
        # "all" fills the model by itself; what stands beside it is dropped, as upstream does.
        count = layers if repeats == "all" else count + len(kinds) * int(repeats or 0)
    if config.attention_config is not None and count != layers:
        yield name, f"{name} names {count} layers, but num_layers is {layers}. Make them equal."


@CHECKS.reading(
    *("model_parallel_size", "num_attention_heads", "num_kv_heads", "hidden_size", "activation"),
    *("intermediate_size", "expansion_factor", "mlp_multiple_of"),
)
def _tensor_parallel_divides(config: NeoXConfig) -> Findings:
    tp = config.model_parallel_size
    parts = {"num_attention_heads": config.num_attention_heads}
    if config.num_kv_heads is not None:
        parts["num_kv_heads"] = config.num_kv_heads
    parts["the MLP's inner width"] = config.ffn_size
    uneven = [f"{name} ({size})" for name, size in parts.items() if size % tp]
    if uneven:
        verb = "is" if len(uneven) == 1 else "are"
        yield (
            "model_parallel_size",
            f"model_parallel_size is {tp}, but {listed(uneven, 'and')} {verb} not divisible by it. "
            f"Use {options(tp, divisors(*parts.values()))}.",
        )


@CHECKS.reading("pipe_parallel_size", "num_layers", "pipe_partition_method")
def _stages_divide_layers(config: NeoXConfig) -> Findings:
    stages, layers = config.pipe_parallel_size, config.num_layers
    if config.pipe_partition_method == DEFAULT_PARTITION and stages and layers % stages:
        yield (
            "pipe_parallel_size",
            f"pipe_parallel_size is {stages}, but num_layers ({layers}) is not divisible by it. "
            f"Use {options(stages, divisors(layers))}.",
        )
    elif stages > layers:
        yield (
            "pipe_parallel_size",
            f"pipe_parallel_size is {stages}, but there are only {layers} layers (num_layers). "
            f"Use {layers} or less.",
        )


@CHECKS.reading("pipe_partition_method")
def _partition_method_exists(config: NeoXConfig) -> Findings:
    method = config.pipe_partition_method
    if method.lower() not in ("parameters", "uniform") and not method.lower().startswith("type:"):
        yield (
            "pipe_partition_method",
            f"pipe_partition_method is {show(method)}, but it must be parameters, uniform or "
            f"type: with a pattern of layer names, such as {DEFAULT_PARTITION}.",
        )


@CHECKS.reading("zero_optimization", "pipe_parallel_size")
def _zero_fits_pipeline(config: NeoXConfig) -> Findings:
    stage, name = config.zero_stage, "zero_optimization.stage"
    if stage > 1 and config.pipe_parallel_size > 0:
        whole = "gradients" if stage == 2 else "weights and gradients"
        yield (
            name,
            f"{name} is {stage}, but pipe_parallel_size is {config.pipe_parallel_size}: the "
            f"pipeline engine keeps whole {whole}. Use stage 1, or pipe_parallel_size: 0.",
        )


@CHECKS.reading("zero_optimization")
def _what_is_offloaded_is_sharded(config: NeoXConfig) -> Findings:
    wanted = {
        "offload_optimizer": (1, "the state where it is. Use stage 1, 2 or 3."),
        "offload_param": (3, "the weights where they are. Use stage 3."),
    }
    for name, (least, advice) in wanted.items():
        block = (config.zero_optimization or {}).get(name)
        if block and block.get("device", "none") != "none" and config.engine_zero_stage < least:
            yield (
                f"zero_optimization.{name}",
                f"zero_optimization.{name} is {show(block)}, but the stage is {config.zero_stage}, "
                f"which leaves {advice}",
            )


@CHECKS.reading("prescale_gradients", "zero_optimization")
def _scattered_gradients_are_not_prescaled(config: NeoXConfig) -> Findings:
    stage, zero = config.zero_stage, config.zero_optimization or {}
    if config.prescale_gradients and stage > 1 and zero.get("reduce_scatter") is not False:
        also = ", or zero_optimization.reduce_scatter: false" if stage == 2 else ""
        yield (
            "prescale_gradients",
            f"prescale_gradients is true, but zero_optimization.stage is {stage}, which scatters "
            f"gradients and divides them afterwards. Use stage 0 or 1{also}.",
        )


@CHECKS.reading("num_nodes")
def _some_nodes(config: NeoXConfig) -> Findings:
    if config.num_nodes == 0:
        yield "num_nodes", "num_nodes is 0, but a run needs a machine. Use 1, or -1 for all."


@CHECKS.reading("include", "exclude")
def _one_host_filter(config: NeoXConfig) -> Findings:
    if config.include and config.exclude:
        yield (
            "exclude",
            f"exclude is {show(config.exclude)}, but include ({show(config.include)}) says "
            "already which slots to use. Keep one of them.",
        )


@CHECKS.reading("train_iters", "train_epochs")
def _one_way_to_end(config: NeoXConfig) -> Findings:
    if config.train_iters is not None and config.train_epochs is not None:
        yield (
            "train_epochs",
            f"train_epochs is {config.train_epochs}, but train_iters ({config.train_iters}) says "
            "as well how long to train. Keep one of them.",
        )


@CHECKS.reading("checkpoint_factor", "checkpoint_scale")
def _saves_have_a_spacing(config: NeoXConfig) -> Findings:
    name, factor = "checkpoint_factor", config.checkpoint_factor
    if factor is None:
        return
    if config.checkpoint_scale == "linear" and factor != int(factor):
        yield (
            name,
            f"{name} is {factor:g}, but with checkpoint_scale: linear it is a whole number of "
            f"iterations. Use {max(1, round(factor))}.",
        )
    if config.checkpoint_scale == "log" and factor <= 1:
        yield (
            name,
            f"{name} is {factor:g}, but with checkpoint_scale: log it is the ratio between two "
            "saves, more than 1. Use 2.",
        )


@CHECKS.reading("extra_save_iters")
def _extra_saves_are_iterations(config: NeoXConfig) -> Findings:
    for iteration in config.extra_save_iters or []:
        if iteration < 0:
            yield (
                "extra_save_iters",
                f"extra_save_iters holds {iteration}, but iterations are 0 or more.",
            )
            return


@CHECKS.reading("limit")
def _limit_is_count_or_share(config: NeoXConfig) -> Findings:
    if config.limit is not None and config.limit > 1 and config.limit != int(config.limit):
        yield (
            "limit",
            f"limit is {config.limit:g}, but it must be a whole number of documents, or a share "
            f"below 1. Use {round(config.limit)}.",
        )


@CHECKS.reading("fewshot_as_multiturn", "apply_chat_template")
def _turns_need_a_template(config: NeoXConfig) -> Findings:
    if config.fewshot_as_multiturn and not config.apply_chat_template:
        yield (
            "fewshot_as_multiturn",
            "fewshot_as_multiturn is true, but only a chat template has turns. Set "
            "apply_chat_template: true as well.",
        )
