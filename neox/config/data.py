"""The datasets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from neox.config.fields import derived, key, refused

_REWARDS = "rewards beside the text are not supported"
_PAIRS = "preference pairs are not supported"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Tokenized datasets (`{path}.bin` and `{path}.idx`) and how samples are cut from them."""

    data_path: str | None = key(
        None, "Dataset to split into training, validation and test, without .bin or .idx."
    )
    split: str = key("969, 30, 1", "Shares of data_path for training, validation and test.")
    train_data_paths: list[str] | None = key(None, "Instead of data_path: datasets to train on.")
    valid_data_paths: list[str] | None = key(None, "Datasets to validate on.")
    test_data_paths: list[str] | None = key(None, "Datasets to test on.")
    train_data_weights: list[float] | None = key(None, "One weight for each of train_data_paths.")
    valid_data_weights: list[float] | None = key(None, "One weight for each of valid_data_paths.")
    test_data_weights: list[float] | None = key(None, "One weight for each of test_data_paths.")
    weight_by_num_documents: bool = key(
        False,
        "Weigh each of the datasets by its documents n: n^alpha / the sum of all, alpha being "
        "weighted_sampler_alpha.",
    )
    weighted_sampler_alpha: float = key(
        1.0, "Exponent of those weights: 1 follows the documents, 0 draws from all alike.", low=0
    )

    finetune_data: str | list[str] | None = key(
        None,
        "Instead of data_path: files of examples to train on (text or JSON Lines), folders of "
        "them, or patterns such as texts/*.txt.",
    )
    finetune_valid_data: str | list[str] | None = key(
        None, "The same to validate on, beside finetune_data."
    )
    finetune_text_per: Literal["line", "file"] = key(
        "line", "What is one example in files of text: each line, or all of a file."
    )

    data_impl: Literal["infer", "mmap", "cached"] = key(
        "infer",
        "How files are read: memory-mapped.",
        refused={"cached": "files are always memory-mapped. Use mmap"},
    )
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = key(
        "packed",
        "How documents fill samples: as one stream, cut every seq_length tokens; as many whole "
        "documents as fit, padded; or one document each, padded, as with finetune_data by "
        "default.",
    )
    dataset_impl: Literal["gpt2", "pairwise", "online"] = key(
        "gpt2",
        "Kind of dataset.",
        refused={"pairwise": _PAIRS, "online": "online reinforcement learning is not supported"},
    )
    allow_chopped: bool = key(
        True, "Cut documents longer than a sample, unless packed; false leaves them out."
    )
    eod_mask_loss: bool = key(False, "Leave the end-of-document tokens out of the loss.")
    num_workers: int = key(
        2, "Threads of each process that read ahead; 0 reads when a batch is needed.", low=0
    )
    mmap_warmup: bool = key(False, "Read the files once at the start.")
    use_shared_fs: bool = key(
        True, "The data lies on storage all machines share; false builds its index on each."
    )

    train_label_data_paths: list[str] | None = key(
        None, "One dataset of labels for each of train_data_paths; -100 is left out of the loss."
    )
    valid_label_data_paths: list[str] | None = key(
        None, "One dataset of labels for each of valid_data_paths; -100 is left out of the loss."
    )
    test_label_data_paths: list[str] | None = key(
        None, "One dataset of labels for each of test_data_paths; -100 is left out of the loss."
    )
    train_reward_data_paths: list[str] | None = refused(None, "Rewards to train on.", _REWARDS)
    valid_reward_data_paths: list[str] | None = refused(None, "Rewards to validate on.", _REWARDS)
    test_reward_data_paths: list[str] | None = refused(None, "Rewards to test on.", _REWARDS)
    pos_train_data_paths: list[str] | None = refused(None, "Preferred texts.", _PAIRS)
    neg_train_data_paths: list[str] | None = refused(None, "Rejected texts.", _PAIRS)
    pos_valid_data_paths: list[str] | None = refused(None, "Preferred texts.", _PAIRS)
    neg_valid_data_paths: list[str] | None = refused(None, "Rejected texts.", _PAIRS)
    pos_test_data_paths: list[str] | None = refused(None, "Preferred texts.", _PAIRS)
    neg_test_data_paths: list[str] | None = refused(None, "Rejected texts.", _PAIRS)
    pos_train_label_data_paths: list[str] | None = refused(None, "Their labels.", _PAIRS)
    neg_train_label_data_paths: list[str] | None = refused(None, "Their labels.", _PAIRS)
    pos_valid_label_data_paths: list[str] | None = refused(None, "Their labels.", _PAIRS)
    neg_valid_label_data_paths: list[str] | None = refused(None, "Their labels.", _PAIRS)
    pos_test_label_data_paths: list[str] | None = refused(None, "Their labels.", _PAIRS)
    neg_test_label_data_paths: list[str] | None = refused(None, "Their labels.", _PAIRS)

    config_files: dict[str, Any] | None = derived(
        None, "Texts of the files that made this configuration.", "the files that are given set it"
    )
