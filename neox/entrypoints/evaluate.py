"""`./deepy.py evaluate.py`: a checkpoint's scores on tasks."""

from __future__ import annotations

from neox import log
from neox.config import NeoXConfig
from neox.evaluation import run
from neox.evaluation.tasks import load_tasks
from neox.inference.load import load_model, open_checkpoint
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import build_tokenizer
from neox.train.trackers import open_trackers


def main(config: NeoXConfig, groups: ProcessGroups) -> None:
    """Evaluate; rank 0 prints the table and writes the results file. Collective over the world."""
    checkpoint = open_checkpoint(config, groups)
    if groups.rank == 0:
        run.check_prefix(config.eval_results_prefix)
    tasks = load_tasks(config)
    tokenizer = build_tokenizer(config)
    model = load_model(config, groups, checkpoint, tokenizer.vocab_size)
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
