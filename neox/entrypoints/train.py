"""train.py: pre-training and fine-tuning."""

from __future__ import annotations

from pathlib import Path

from neox import log, progress
from neox.checkpoint.directory import check_writable, recover
from neox.checkpoint.lock import saving_alone
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.vocabulary import padded_vocab_size
from neox.config import NeoXConfig
from neox.data.changes import order_facts, warn_of_change
from neox.data.loaders import build_loaders, settle_iterations
from neox.engine.build import build_engine
from neox.errors import ConfigError
from neox.model.gpt import count_parameters
from neox.model.layout import pad_vocab_size
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import Tokenizer, build_tokenizer
from neox.train.evaluations import Evaluations, Scores
from neox.train.examples import tokenize_examples
from neox.train.loop import train
from neox.train.metrics import RunLog
from neox.train.saved_schedule import settle_schedule
from neox.train.start import find_start, read_start


def main(config: NeoXConfig, groups: ProcessGroups) -> None:
    """Train, validate, test. Collective over the world."""
    if config.dtype == "float16" and groups.device.type == "cpu":
        raise ConfigError(
            "fp16 training needs a GPU: DeepSpeed has no float16 optimizer for the CPU. "
            "Use --set precision=bfloat16 or --set precision=fp32 here."
        )
    if config.save is None:
        _run(config, groups)
        return
    directory = Path(config.save)
    check_writable(directory)
    with saving_alone(directory, groups):
        recover(directory, groups)
        _run(config, groups)


def _run(config: NeoXConfig, groups: ProcessGroups) -> None:
    tokenizer = build_tokenizer(config)
    config = tokenize_examples(config, groups, tokenizer)
    config = settle_iterations(config, groups, vocab_size=tokenizer.vocab_size)
    scores = _task_scores(config, groups, tokenizer)
    if config.engine_zero_stage != config.zero_stage:
        log.info(
            f"zero_optimization: stage 0 runs as stage 1 in {config.dtype}, the same arithmetic in "
            "less memory"
        )
    start = find_start(config, groups)
    config = settle_schedule(config, start.resumed, with_optimizer=start.with_optimizer)
    if start.iteration >= config.train_iters:
        log.info(
            f"train_iters ({config.train_iters}) is reached: nothing to train, only evaluating"
        )
    rows = _vocabulary_rows(config, start.checkpoint, tokenizer)
    log.info(
        f"model: {count_parameters(config, rows):,} parameters, "
        f"vocabulary {tokenizer.vocab_size} padded to {rows}; "
        f"grid: tp {groups.tp} x pp {groups.pp} x dp {groups.dp}; {config.dtype}"
    )
    loaders = build_loaders(
        config, groups, start.iteration, tokenizer.eod, vocab_size=tokenizer.vocab_size
    )
    adapters = read_start(config, start, rows)
    engine = build_engine(config, groups, rows, start.checkpoint, adapters)
    if config.lora is not None:
        layouts = [layer.trained for layer in engine.layers if layer.has_file]
        trained = sum(param.numel for layout in layouts for param in layout.values())
        held = "8 bits" if config.load_in_8bit else config.dtype
        log.info(f"lora: {trained:,} parameters are trained, the model's matrices are in {held}")
    if start.with_optimizer:
        assert start.resumed is not None
        scratch = Path(config.save or start.resumed.folder.parent)
        state = engine.load_optimizer(start.resumed, scratch)
        if isinstance(state.get("data"), dict) and loaders.train is not None:
            warn_of_change(state["data"], order_facts(config, loaders.train))

    evaluations = Evaluations(config, groups, engine, loaders, tokenizer, rows, scores)
    if start.resumed is not None and (config.lora is None or start.own is not None):
        evaluations.check_fingerprint(start.resumed.folder)
    with RunLog(config, groups, iteration=start.iteration, padded_vocab_size=rows) as run:
        with progress.stopping_after_a_step(possible=config.save is not None):
            iteration = train(
                config, groups, engine, loaders, evaluations, run, start.iteration, rows
            )
        if progress.stops_after(iteration):
            return  # somebody waits for the end
        for chart, data, metrics in evaluations.at_the_end(iteration):
            if metrics:
                run.evaluation(chart, iteration, metrics, f"the end of training for {data} data")


def _task_scores(config: NeoXConfig, groups: ProcessGroups, tokenizer: Tokenizer) -> Scores | None:
    """Of eval_tasks, if there are any: lm-eval takes seconds to import."""
    if not config.eval_tasks:
        return None
    from neox.evaluation.while_training import TaskScores

    return TaskScores(config, groups, tokenizer)


def _vocabulary_rows(
    config: NeoXConfig, checkpoint: Checkpoint | None, tokenizer: Tokenizer
) -> int:
    """A fresh model's vocabulary is padded as configured, a checkpoint's stays as it is."""
    if checkpoint is None:
        return pad_vocab_size(tokenizer.vocab_size, config.make_vocab_size_divisible_by, config.tp)
    rows = padded_vocab_size(config, checkpoint.padded_vocab_size, tokenizer.vocab_size)
    padded = pad_vocab_size(rows, 1, config.tp)
    if padded > rows:
        log.info(
            f"vocabulary: {padded - rows} zero rows added to {rows}, for model_parallel_size "
            f"{config.tp}"
        )
    return padded
