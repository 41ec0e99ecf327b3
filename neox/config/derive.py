"""Values that follow from others: precision, optimizer, prompts, sizes."""

from __future__ import annotations

from neox.config.accept import accept_block
from neox.config.arithmetic import multiples_around
from neox.config.batch import implied_replicas, settle_batch
from neox.config.config import NeoXConfig
from neox.config.draft import Draft
from neox.config.grid import advise_grid
from neox.config.optimizer_params import OPTIMIZER_PARAMS, REFUSED
from neox.config.values import listed, nearest, show

_OPTIMIZERS = {"adamw": "adam"} | {kind: kind for kind in OPTIMIZER_PARAMS}


def settle_precision(draft: Draft) -> None:
    """`precision` from itself and the fp16 and bf16 blocks, which must not disagree."""
    if draft.bad & {"precision", "fp16", "bf16"}:
        return
    fp16 = draft.values.get("fp16") or {}
    bf16 = draft.values.get("bf16") or {}
    switches = {"fp16": fp16.get("enabled"), "bfloat16": bf16.get("enabled")}
    paths = {"fp16": "fp16.enabled", "bfloat16": "bf16.enabled"}
    if fp16.get("type") == "bfloat16":  # the older way to ask for bf16
        if switches["bfloat16"] is None:
            switches, paths = {"bfloat16": switches["fp16"]}, {"bfloat16": "fp16.enabled"}
        else:
            switches["fp16"] = None
    on = [name for name, enabled in switches.items() if enabled]
    if len(on) == 2:
        draft.problem(
            "bf16.enabled",
            "bf16.enabled is true, but fp16.enabled is true as well. Keep one of them.",
        )
        return
    wanted = draft.values.get("precision")
    if wanted is not None and draft.from_command_line("precision"):
        return  # --set precision=fp32 is enough to run a file's fp16 model on a CPU
    if wanted is None:
        draft.settle("precision", on[0] if on else "fp32")
    elif on and wanted != on[0]:
        draft.problem(
            "precision",
            f'precision is "{wanted}", but {paths[on[0]]} is true. Drop one of them.',
        )
    elif switches.get(wanted) is False:
        draft.problem(
            "precision",
            f'precision is "{wanted}", but {paths[wanted]} is false. Drop one of them.',
        )


def settle_optimizer(draft: Draft) -> None:
    """`optimizer_type` and `lr` from the optimizer block; `zero_stage` from its own."""
    if "zero_optimization" not in draft.bad:
        zero = draft.values.get("zero_optimization") or {}
        draft.settle("zero_stage", zero.get("stage") or 0)
    if draft.bad & {"optimizer", "optimizer_type"}:
        return
    block = draft.values.get("optimizer") or {}
    kind = _optimizer_type(draft, block.get("type"))
    if kind is None or not block.get("params"):
        return
    params = accept_block(draft, "optimizer.params", OPTIMIZER_PARAMS[kind], block["params"])
    draft.values["optimizer"] = block | {"params": params}
    _check_betas(draft, params.get("betas"))
    if params.get("lr") is not None:
        draft.settle("lr", params["lr"])
        draft.origins["lr"] = draft.origin("optimizer.params.lr")


def _optimizer_type(draft: Draft, named: str | None) -> str | None:
    """What `optimizer.type` and `optimizer_type` say together; None when that is wrong."""
    other = draft.values.get("optimizer_type")
    if named is None:
        return other or "adam"
    kind = _OPTIMIZERS.get(named.lower())
    if kind is None:
        draft.problem("optimizer.type", f"optimizer.type is {show(named)}, {_advise(named)}")
    elif other not in (None, kind):
        draft.problem(
            "optimizer_type",
            f"optimizer_type is {show(other)}, but optimizer.type is {show(named)}. "
            "Drop optimizer_type.",
        )
    else:
        draft.settle("optimizer_type", kind)
        return kind
    return None


def _advise(named: str) -> str:
    if named.lower() in REFUSED:
        return f"which is refused: {REFUSED[named.lower()]}."
    near = nearest(named, _OPTIMIZERS)
    advice = f"Did you mean {near}?" if near else f"Use {listed(_OPTIMIZERS)}."
    return f"which is not an optimizer. {advice}"


def _check_betas(draft: Draft, betas: list[float] | None) -> None:
    if betas is not None and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
        draft.problem(
            "optimizer.params.betas",
            f"optimizer.params.betas is {show(betas)}, but it must be two numbers from 0 up to, "
            "not including, 1, such as [0.9, 0.95].",
        )


def settle_packing(draft: Draft) -> None:
    """An example of finetune_data is a sample of its own, unless another pack_impl is given."""
    if draft.values.get("finetune_data") and "pack_impl" not in draft.values:
        draft.settle("pack_impl", "unpacked")


def settle_prompts(draft: Draft) -> None:
    """Prompts come from a file when one is given on the command line, or nothing else is said."""
    if draft.values.get("sample_input_file") is None:
        return
    from_command_line = draft.from_command_line("sample_input_file")
    said_there = draft.from_command_line("text_gen_type")
    if "text_gen_type" not in draft.values:
        draft.settle("text_gen_type", "input-file")
    elif from_command_line and not said_there:
        draft.values["text_gen_type"] = "input-file"
        draft.origins["text_gen_type"] = draft.origin("sample_input_file")


def settle_sizes(draft: Draft, config: NeoXConfig, world_size: int | None, *, strict: bool) -> None:
    """`world_size` and the batch sizes, for the grid of `config`.

    A world that is not known yet is as large as num_gpus and num_nodes say, else one process for
    each part of the model, times the replicas that the batch sizes call for.
    """
    draft.settle("is_pipe_parallel", config.pipe_parallel_size >= 1)
    if draft.bad & {"model_parallel_size", "pipe_parallel_size", "num_gpus", "num_nodes"}:
        return
    tp, pp = config.tp, config.pp
    parts = tp * pp
    if world_size is None:
        here, nodes = config.num_gpus, max(1, config.num_nodes)
        world_size = here * nodes if here else parts * implied_replicas(draft)
    draft.settle("world_size", world_size)
    if world_size % parts:
        blamed = "num_gpus" if "num_gpus" in draft.values else "model_parallel_size"
        draft.problem(
            blamed if blamed in draft.values else "pipe_parallel_size",
            f"the run has {world_size} process{'es' * (world_size > 1)}, but one copy of the model "
            f"takes model_parallel_size ({tp}) x pipe_parallel_size ({pp}) = {parts}. Use "
            f"{listed(multiples_around(world_size, parts))} processes, "
            f"{advise_grid(config, world_size, draft.bad)}",
        )
        return
    replicas = world_size // parts
    layout = f"data-parallel replicas ({replicas}"
    if parts > 1:
        layout += f" = {world_size} processes / {tp} tensor-parallel / {pp} pipeline stages"
    settle_batch(draft, replicas, f"{layout})", strict=strict)
    draft.settle("batch_size", draft.values.get("train_micro_batch_size_per_gpu"))
