"""Evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from neox.config.fields import key


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What evaluate.py measures, and how."""

    eval_tasks: list[str] | None = key(
        None, "Tasks of evaluate.py, and of every validation while training."
    )
    eval_results_prefix: str = key("", "Prefix of the results file.")
    eval_batch_size: int | None = key(
        None, "Inputs of a forward pass of evaluate.py; by default as many as are fast.", low=1
    )
    eval_data_dir: str | None = key(None, "Folder with local copies of the tasks' data.")
    eval_own_documents: bool = key(
        False, "The files in eval_data_dir are not the published ones, and need not be like them."
    )
    eval_cache_dir: str | None = key(
        None, "Where answers are kept for the next run; NEOX_CACHE or ~/.cache/neox by default."
    )
    eval_use_cache: bool = key(True, "Take answers that an earlier run kept, and keep new ones.")
    include_path: str | None = key(None, "Folder with task definitions (YAML) of your own.")
    apply_chat_template: bool = key(
        False, "Put every prompt into the chat template of chat_template_path."
    )
    chat_template_path: str | None = key(
        None,
        "Folder of a transformers tokenizer with a chat template, for apply_chat_template and for "
        "conversations in finetune_data; vocab_file's by default.",
    )
    system_instruction: str | None = key(None, "What a task's prompts begin with.")
    fewshot_as_multiturn: bool = key(
        False, "With a chat template, solved examples are turns of the conversation."
    )
    num_fewshot: int | None = key(
        None, "Solved examples before each document; the task's own number by default.", low=0
    )
    limit: int | float | None = key(
        None, "Documents of each task, or a share below 1; all by default.", above=0
    )
