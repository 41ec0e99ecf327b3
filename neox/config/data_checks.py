"""Keys about the data that must agree with one another, whatever the run is for."""

from __future__ import annotations

import math

from neox.config.checks import Checks, Findings
from neox.config.config import NeoXConfig
from neox.config.values import listed, show

CHECKS = Checks()


@CHECKS.reading("split")
def _split_has_shares(config: NeoXConfig) -> Findings:
    try:
        shares = [float(share) for share in config.split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    sensible = len(shares) in (1, 2, 3) and all(0 <= share < math.inf for share in shares)
    if not sensible or sum(shares) == 0:
        yield (
            "split",
            f"split is {show(config.split)}, but it must be the shares of training, validation "
            'and test, numbers of 0 or more that are not all 0, such as "969, 30, 1".',
        )


@CHECKS.reading("data_path", "train_data_paths", "valid_data_paths", "test_data_paths")
def _one_way_to_name_data(config: NeoXConfig) -> Findings:
    names = ("train_data_paths", "valid_data_paths", "test_data_paths")
    given = [name for name in names if getattr(config, name)]
    missing = [name for name in names if name not in given]
    if given and config.data_path is not None:
        yield (
            "data_path",
            f"data_path is {show(config.data_path)}, but there {_is(given)} {listed(given, 'and')} "
            "too. Keep data_path with split, or the three lists.",
        )
    elif given and missing:
        yield (
            given[0],
            f"there {_is(given)} {listed(given, 'and')}, but no {listed(missing)}. Give all three.",
        )


_DATASETS = (
    "data_path",
    *(f"{split}_data_paths" for split in ("train", "valid", "test")),
    *(f"{split}_label_data_paths" for split in ("train", "valid", "test")),
)


@CHECKS.reading("finetune_data", "finetune_valid_data", *_DATASETS)
def _examples_or_datasets(config: NeoXConfig) -> Findings:
    given = [name for name in _DATASETS if getattr(config, name)]
    if config.finetune_data and given:
        clear = listed((f"--set {name}=null" for name in given), "and")
        yield (
            "finetune_data",
            f"finetune_data is {show(config.finetune_data)}, but there {_is(given)} "
            f"{listed(given, 'and')} too. Train on one of them: drop finetune_data, or leave the "
            f"datasets out with {clear}.",
        )
    if config.finetune_valid_data and not config.finetune_data:
        yield (
            "finetune_valid_data",
            f"finetune_valid_data is {show(config.finetune_valid_data)}, but there is no "
            "finetune_data to train on. Datasets are validated on with valid_data_paths.",
        )


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


@CHECKS.reading(
    *("train_data_paths", "valid_data_paths", "test_data_paths"),
    *("train_data_weights", "valid_data_weights", "test_data_weights"),
)
def _weights_match_paths(config: NeoXConfig) -> Findings:
    for split in ("train", "valid", "test"):
        name = f"{split}_data_weights"
        paths, weights = getattr(config, f"{split}_data_paths") or [], getattr(config, name)
        if weights is None:
            continue
        if len(weights) != len(paths):
            yield (
                name,
                f"{name} holds {len(weights)} weight{'s' * (len(weights) != 1)}, but "
                f"{split}_data_paths holds {len(paths)} path{'s' * (len(paths) != 1)}. Give one "
                "weight for each path.",
            )
        elif not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
            yield name, f"{name} is {show(weights)}, but weights are 0 or more, and not all 0."


@CHECKS.reading(
    *("train_data_paths", "valid_data_paths", "test_data_paths"),
    *("train_label_data_paths", "valid_label_data_paths", "test_label_data_paths"),
)
def _labels_match_paths(config: NeoXConfig) -> Findings:
    for split in ("train", "valid", "test"):
        name = f"{split}_label_data_paths"
        labels, paths = getattr(config, name), getattr(config, f"{split}_data_paths")
        if labels and not paths:
            yield (
                name,
                f"{name} is given, but {split}_data_paths is missing. Labels go with datasets of "
                "their own: name both, in the same order.",
            )
        elif labels and len(labels) != len(paths):
            yield (
                name,
                f"{name} holds {len(labels)} path{'s' * (len(labels) != 1)}, but "
                f"{split}_data_paths holds {len(paths)}. Give one for each, in the same order.",
            )


@CHECKS.reading("train_epochs", "train_data_weights", "weight_by_num_documents")
def _epochs_are_of_whole_datasets(config: NeoXConfig) -> Findings:
    if config.train_epochs is None:
        return
    weights = config.train_data_weights or []
    if config.weight_by_num_documents:
        name = "weight_by_num_documents"
    elif any(weight != 1 for weight in weights):
        name = "train_data_weights"
    else:
        return
    yield (
        "train_epochs",
        f"train_epochs is {config.train_epochs}, which reads every document as often, but {name} "
        f"({show(getattr(config, name))}) reads some datasets more often than others. Drop one of "
        "them.",
    )
