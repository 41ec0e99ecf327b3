"""`./deepy.py evaluate.py`: a checkpoint's scores on tasks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from neox import log
from neox.checkpoint.neox import Checkpoint
from neox.config import NeoXConfig
from neox.errors import CheckpointError
from neox.evaluation import run
from neox.evaluation.tasks import load_tasks
from neox.inference.load import check_vocabulary, load_model
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import build_tokenizer
from neox.train.trackers import open_trackers


def main(config: NeoXConfig, groups: ProcessGroups) -> None:
    """Evaluate; rank 0 prints the table and writes the results file. Collective over the world."""
    log.quiet_third_parties()
    if config.load is None:
        raise CheckpointError("load is not set: set it to the folder of the checkpoint to evaluate")
    checkpoint = Checkpoint.open(Path(config.load), config.iteration)
    if groups.rank == 0:
        run.check_prefix(config.eval_results_prefix)
    tasks = load_tasks(config)
    tokenizer = build_tokenizer(config)
    # The opened folder, for `latest` may name another one by now.
    pinned = dataclasses.replace(config, load=str(checkpoint.folder), iteration=None)
    model = load_model(pinned, groups)
    check_vocabulary(model, tokenizer)
    results = run.evaluate(config, model, tokenizer, groups, tasks)
    results["checkpoint"] = {
        "folder": str(checkpoint.folder.resolve()),
        "iteration": checkpoint.iteration,
    }
    if groups.rank == 0:
        log.info(run.table(results))
        path = run.write_results(results, config.eval_results_prefix)
        log.info(f"results in {path}")
        with open_trackers(config, groups.rank) as trackers:
            trackers.log(run.tracker_metrics(results), step=checkpoint.iteration)
