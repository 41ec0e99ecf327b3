"""What every rank of a planned run sends in one step, and computes: neox.plan.work's values.

Between the ranks of a tp group the traced layers tell it themselves. What DeepSpeed sends between
stages and replicas is arithmetic on the layout; tests/plan counts all of it on real ranks. It holds
for every step but the first, in which a pipeline also tells its tensors' shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from neox.model.gpt import torch_dtype
from neox.model.layout import LayerLayout
from neox.plan.memory import of_replica
from neox.plan.stages import Chunk, PlannedModel
from neox.plan.state import (
    accumulation_dtype,
    communication_dtype,
    flat_size,
    group_numels,
    has_bfloat16_optimizer,
    zero_setting,
)
from neox.plan.work import Group, Message, Operation, StageWork, Work

_FALLBACK = 500_000_000  # elements that DeepSpeed reduces at a time where it has no bucket
Counted = Counter[tuple[Operation, Group, int]]  # by the bytes of one message


def work(model: PlannedModel) -> Work:
    """One step on this grid. Inside `planned_world`."""
    config = model.config
    return Work(
        topology=model.topology,
        micro_batches=config.gradient_accumulation_steps,
        tokens=config.train_batch_size * config.seq_length,
        dtype=config.dtype,
        pipelined=config.is_pipe_parallel,
        stages=tuple(
            _stage_work(model, number, stage) for number, stage in enumerate(model.stages())
        ),
    )


def _stage_work(model: PlannedModel, number: int, stage: range) -> StageWork:
    forward, backward, again = _flops(model, number, stage)
    sent = _between_tensor_parallel(model, number, stage)
    sent += _between_stages(model, number)
    sent += _between_replicas(model, number, stage)
    return StageWork(
        layers=sum(model.is_block(layer) for layer in model.layers[stage.start : stage.stop]),
        forward_flops=forward,
        backward_flops=backward,
        recompute_flops=again,
        optimizer_bytes=_touched(model, stage),
        messages=tuple(
            Message(operation, axis, count, count * size, _overlaps(model, axis))
            for (operation, axis, size), count in sorted(sent.items())
        ),
    )


def _overlaps(model: PlannedModel, axis: Group) -> bool:
    """ZeRO's reductions, where they are asked to; never in a pipeline (neox.config.deepspeed)."""
    asked = bool(zero_setting(model.config, "overlap_comm", False))
    return axis == "dp" and asked and not model.config.is_pipe_parallel


def _between_tensor_parallel(model: PlannedModel, number: int, stage: range) -> Counted:
    config = model.config
    passes = [model.traced(chunk) for chunk in model.chunks(stage)]
    passes += [model.head] if number == config.pp - 1 else []
    sent: Counted = Counter()
    for one in passes:
        for (operation, size), count in one.messages.items():
            sent[operation, "tp", size] += count * config.gradient_accumulation_steps  # type: ignore[index]
    return sent


def _between_stages(model: PlannedModel, number: int) -> Counted:
    """Activations to the next stage, their gradients to the one before; and what tp makes of it."""
    config, sent = model.config, Counted()
    if config.pp == 1:
        return sent
    first, last = number == 0, number == config.pp - 1
    batches = config.gradient_accumulation_steps
    neighbours = batches * ((not first) + (not last))
    size = model.activation_bytes
    if config.tp == 1 or config.sequence_parallel:
        sent["send", "pp", size] += neighbours
    else:
        # DeepSpeed sends a 1/tp with a description of it, and gathers: what came, what went (for
        # its backward pass), and its gradient.
        sent["send", "pp", size // config.tp] += neighbours
        sent["send", "pp", 8 * (7 + config.tp)] += neighbours
        sent["all_gather", "tp", size] += batches * ((not first) + 2 * (not last))
    sent["broadcast", "pp", 8] += 1  # the loss, to be told
    return sent


def _between_replicas(model: PlannedModel, number: int, stage: range) -> Counted:
    """Gradients, weights and the norm of the gradient, once a step."""
    config, sent = model.config, Counted()
    groups = _groups(model, stage)
    dp, parts = config.dp, config.tp * config.pp
    replica: Group = "pp" if config.tp == 1 else "tp" if config.pp == 1 else "replica"
    size = torch_dtype(config.dtype).itemsize
    if dp > 1 and (number == config.pp - 1):
        sent["all_reduce", "dp", 4] += 1  # the loss
    if config.pp > 1 and (tied := _tied_bytes(model)) and number in (0, config.pp - 1):
        sent["all_reduce", "pp", tied] += 1
    if config.engine_zero_stage == 0 or has_bfloat16_optimizer(config):
        if dp > 1:
            size_sent = communication_dtype(config).itemsize
            for numel in _fallback_buckets([n for group in groups for n in group]):
                sent["all_reduce", "dp", size_sent * numel] += 1
        if parts > 1:
            sent["all_reduce", replica, 4] += 1
    else:
        sent += _of_zero(model, stage)
        if parts > 1:
            sent["all_reduce", replica, 4] += _norms(model)
        if dp > 1:
            sent["all_reduce", "dp", 4] += _norms(model)
    if config.engine_zero_stage in (1, 2) and dp > 1:
        for group in groups:
            sent["all_gather", "dp", size * flat_size(group, config, size)] += 1
    return sent


def _norms(model: PlannedModel) -> int:
    """Optimizer groups of the stage that has the most: each has a message for its norm."""
    return max(len(_groups(model, stage)) for stage in model.stages())


def _of_zero(model: PlannedModel, stage: range) -> Counted:
    """The buckets in which ZeRO 1 and 2 reduce gradients."""
    config, sent = model.config, Counted()
    if config.dp == 1:
        return sent
    if config.engine_zero_stage == 3:
        return _of_zero_3(model, stage)
    size = communication_dtype(config).itemsize
    # With the gradients cut, every micro-batch's are reduced.
    times = config.gradient_accumulation_steps if config.engine_zero_stage == 2 else 1
    limit = int(zero_setting(config, "reduce_bucket_size", _FALLBACK))
    groups = group_numels(config, model.reached(stage))
    for numel in _buckets([n for group in groups for n in group], limit):
        sent["all_reduce", "dp", size * numel] += times
    return sent


def _of_zero_3(model: PlannedModel, stage: range) -> Counted:
    """Weights gathered for both passes and gradients scattered, layer by layer: the bytes are
    right, but DeepSpeed joins and parts the calls as its buckets are."""
    config, sent = model.config, Counted()
    size, batches = torch_dtype(config.dtype).itemsize, config.gradient_accumulation_steps
    for layer in model.layers[stage.start : stage.stop]:
        if layer.has_file:
            numel = sum(p.numel() for p in model.module(layer).parameters() if p.requires_grad)
            sent["all_gather", "dp", size * numel] += 2 * batches
            sent["reduce_scatter", "dp", size * numel] += batches
    return sent


def _buckets(numels: Sequence[int], limit: int) -> Iterator[int]:
    """Of as many gradients, in this order, as there is place for."""
    filled = 0
    for numel in numels:
        if filled and filled + numel > limit:
            yield filled
            filled = 0
        filled += numel
    if filled:
        yield filled


def _fallback_buckets(numels: Sequence[int]) -> Iterator[int]:
    """Each reaches beyond the limit."""
    filled = 0
    for numel in numels:
        filled += numel
        if filled > _FALLBACK:
            yield filled
            filled = 0
    if filled:
        yield filled


def _groups(model: PlannedModel, stage: range) -> list[list[int]]:
    return group_numels(model.config, model.trained(stage))


def _tied_bytes(model: PlannedModel) -> int:
    """Of the gradient of the weights that the first and the last stage share; 0 for none."""
    first = model.layers[0]
    if not first.tied or first.frozen:
        return 0
    table = model.module(first).word_embeddings.weight
    return int(table.numel()) * accumulation_dtype(model.config).itemsize


def _touched(model: PlannedModel, stage: range) -> int:
    """Bytes that a step of the optimizer reads and writes, at least: state and masters both ways,
    gradients, and the weights that it writes."""
    own = of_replica(model, stage)
    return 2 * (own.optimizer + own.host) + own.gradients + own.weights


def _flops(model: PlannedModel, number: int, stage: range) -> tuple[float, float, float]:
    """(forward, backward, again) of matrix products of one micro-batch on a rank.

    Two for each multiply-add; of attention's scores all S x S, as usual (arXiv:2104.04473, though a
    causal kernel leaves half of them out). Backward a product has two of the same size, one where
    its weight is frozen. The loss computes its gradients in its forward pass: they are counted
    backward. A recomputation is shorter than the forward pass: see `_left_out`.
    """
    config = model.config
    tokens = config.train_micro_batch_size_per_gpu * config.seq_length
    attention = 4.0 * tokens * config.seq_length * config.head_dim
    attention *= config.num_attention_heads / config.tp
    forward = backward = again = 0.0
    chunks = [(layer, chunk.recomputed) for chunk in model.chunks(stage) for layer in chunk.layers]
    chunks += [(model.layers[-1], False)] if number == config.pp - 1 else []
    for layer, is_recomputed in chunks:
        if layer.layout is None or (layer.index == 0):
            continue
        dense = 2.0 * tokens * _matrix_elements(layer.layout, config.tp)
        small = 2.0 * tokens * _matrix_elements(layer.adapters, config.tp)
        scores = attention if model.is_block(layer) else 0.0
        forward += dense + small + scores
        backward += dense * (1 if layer.frozen else 2) + 2 * (small + scores)
        again += (dense + small + scores) if is_recomputed else 0.0
    again -= sum(_left_out(model, chunk) for chunk in model.chunks(stage) if chunk.recomputed)
    return forward, backward, again


def _left_out(model: PlannedModel, chunk: Chunk) -> float:
    """FLOPs of a forward pass through a chunk that its recomputation does not need.

    torch ends it as soon as it has all that the backward pass reads (early stop of
    torch.utils.checkpoint). That is the input of the last layer's last product, but not its result,
    unless dropout or an adapter follows. On a CPU, float32's product notes its input afterwards.
    """
    config, last = model.config, chunk.layers[-1]
    is_late = model.on_cpu and config.dtype == "float32"
    if not model.is_block(last) or last.frozen or config.hidden_dropout or is_late:
        return 0.0
    assert last.layout is not None
    rows, columns = last.layout["mlp.linear2.weight"].shard_shape(config.tp)
    tokens = config.train_micro_batch_size_per_gpu * config.seq_length
    return 2.0 * tokens * rows * columns


def _matrix_elements(layout: LayerLayout, tp: int) -> int:
    total = 0
    for name, param in layout.items():
        if len(param.shape) == 2 and not name.startswith("position"):
            rows, columns = param.shard_shape(tp)
            total += rows * columns
    return total
