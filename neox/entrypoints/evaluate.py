"""`./deepy.py evaluate.py`: a checkpoint's scores on tasks."""

from __future__ import annotations

from neox import log
from neox.config import NeoXConfig
from neox.evaluation.published import find
from neox.evaluation.results import (
    check_prefix,
    published_beside,
    table,
    tracker_metrics,
    write_results,
)
from neox.evaluation.run import evaluate
from neox.evaluation.tasks import load_tasks
from neox.inference.load import load_model, open_checkpoint
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import build_tokenizer
from neox.train.trackers import open_trackers


def main(config: NeoXConfig, groups: ProcessGroups) -> None:
    """Evaluate; rank 0 prints the table and writes the results files. Collective over the world."""
    checkpoint = open_checkpoint(config, groups)
    if groups.rank == 0:
        check_prefix(config.eval_results_prefix)
    tasks = load_tasks(config)
    tokenizer = build_tokenizer(config)
    results = evaluate(
        config,
        lambda: load_model(config, groups, checkpoint, tokenizer.vocab_size),
        tokenizer,
        groups,
        tasks,
        checkpoint,
    )
    if groups.rank == 0:
        model = find(config, checkpoint.iteration)
        results["published"] = model and published_beside(results, model)
        known = results["answers"]["remembered"]
        if known:
            log.info(
                f"{known} of {results['answers']['asked']} answers are of earlier runs, from "
                f"{results['answers']['folder']}; eval_use_cache: false computes all anew"
            )
        log.info(table(results))
        path = write_results(results, config.eval_results_prefix)
        log.info(f"results in {path}")
        with open_trackers(config, groups.rank) as trackers:
            trackers.log(tracker_metrics(results), step=checkpoint.iteration)
