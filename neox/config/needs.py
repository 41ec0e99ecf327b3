"""What each entry point needs to be told."""

from __future__ import annotations

from neox.config.arithmetic import divisors, multiples_around, options
from neox.config.checks import Checks, Findings
from neox.config.config import NeoXConfig
from neox.config.values import listed, show

CHECKS = Checks()
_WITH_TEXT = ("train", "generate", "evaluate", "serve")
_TOKENIZER_FILES = {
    "GPT2BPETokenizer": {"vocab_file": "GPT-2's vocab.json", "merge_file": "its merges.txt"},
    "HFTokenizer": {"vocab_file": "the tokenizer's .json file"},
    "SPMTokenizer": {"vocab_file": "the SentencePiece model"},
    "TiktokenTokenizer": {"vocab_file": "the encoding's name, such as cl100k_base"},
}


@CHECKS.reading("tokenizer_type", "vocab_file", "merge_file", purposes=_WITH_TEXT)
def _tokenizer_has_files(config: NeoXConfig) -> Findings:
    for name, what in _TOKENIZER_FILES.get(config.tokenizer_type, {}).items():
        if getattr(config, name) is None:
            yield name, f"{name} is missing: tokenizer_type {config.tokenizer_type} needs {what}."


@CHECKS.reading("data_path", "train_data_paths", "finetune_data", purposes=("train",))
def _training_has_data(config: NeoXConfig) -> Findings:
    if config.data_path is None and not config.train_data_paths and not config.finetune_data:
        yield (
            "data_path",
            "data_path is missing. Name a tokenized dataset: the path of its .bin and .idx files "
            "without the ending. Or name texts as they are with finetune_data.",
        )


@CHECKS.reading("train_iters", "train_epochs", purposes=("train",))
def _training_has_an_end(config: NeoXConfig) -> Findings:
    if config.train_iters is None and config.train_epochs is None:
        yield (
            "train_iters",
            "train_iters is missing. Say how many optimizer steps to take, or with train_epochs "
            "how often to go through the data.",
        )


@CHECKS.reading(
    "sequence_parallel", "model_parallel_size", "seq_length", purposes=("train", "plan")
)
def _shards_divide_sequence(config: NeoXConfig) -> Findings:
    tp, length = config.model_parallel_size, config.seq_length
    if config.sequence_parallel and length % tp:
        yield (
            "sequence_parallel",
            f"sequence_parallel is true, but seq_length ({length}) is not divisible by "
            f"model_parallel_size ({tp}). Use a seq_length of "
            f"{listed(multiples_around(length, tp))}, or {options(tp, divisors(length))} as "
            "model_parallel_size.",
        )


@CHECKS.reading("profile", "profile_step_start", "profile_step_stop", purposes=("train",))
def _profile_has_steps(config: NeoXConfig) -> Findings:
    start, stop = config.profile_step_start, config.profile_step_stop
    if config.profile and stop <= start:
        yield (
            "profile_step_stop",
            f"profile_step_stop ({stop}) is not after profile_step_start ({start}), the first "
            "iteration that is profiled: nothing would be.",
        )


@CHECKS.reading("profile", "tensorboard_dir", "log_dir", purposes=("train",))
def _profile_has_a_place(config: NeoXConfig) -> Findings:
    if config.profile and not (config.tensorboard_dir or config.log_dir):
        yield "profile", "profile needs a folder for its trace: set tensorboard_dir or log_dir."


@CHECKS.reading("lr", "optimizer", "optimizer_type", purposes=("train",))
def _training_has_a_rate(config: NeoXConfig) -> Findings:
    if config.origin("lr") == "default":
        yield (
            "optimizer.params.lr",
            "optimizer.params.lr is missing. Give the peak learning rate, such as "
            '"optimizer": {"type": "Adam", "params": {"lr": 6.0e-4}}.',
        )


@CHECKS.reading("save", "checkpoint_factor", "extra_save_iters", purposes=("train",))
def _saving_has_a_cadence(config: NeoXConfig) -> Findings:
    if config.save is not None and config.checkpoint_factor is None and not config.extra_save_iters:
        yield (
            "save",
            f"save is {show(config.save)}, but nothing says when to save. Give checkpoint_factor "
            "(every so many iterations) or extra_save_iters (a list of iterations).",
        )


@CHECKS.reading("restarts", "save", purposes=("train",))
def _restarts_have_checkpoints(config: NeoXConfig) -> Findings:
    if config.restarts and config.save is None:
        yield (
            "restarts",
            f"restarts is {config.restarts}, but save is missing: there would be nothing to go on "
            "from. Name the folder for checkpoints with save, and checkpoint_factor.",
        )


@CHECKS.reading("finetune", "load", purposes=("train",))
def _finetuning_has_weights(config: NeoXConfig) -> Findings:
    if config.finetune and config.load is None:
        yield (
            "finetune",
            "finetune is true, but load is missing. Name the folder of the checkpoint to start "
            "from.",
        )


@CHECKS.reading("load", purposes=("generate", "evaluate", "serve", "logits"))
def _there_is_a_checkpoint(config: NeoXConfig) -> Findings:
    if config.load is None:
        yield "load", "load is missing. Name the folder of the checkpoint to use."


@CHECKS.reading("text_gen_type", "sample_input_file", purposes=("generate",))
def _prompts_are_given(config: NeoXConfig) -> Findings:
    if config.text_gen_type == "input-file" and config.sample_input_file is None:
        yield (
            "text_gen_type",
            'text_gen_type is "input-file", but there is no sample_input_file. Name it with -i.',
        )


@CHECKS.reading("prompt_end", purposes=("generate",))
def _prompts_have_an_end(config: NeoXConfig) -> Findings:
    if not config.prompt_end:
        yield (
            "prompt_end",
            'prompt_end is "", which separates nothing. Give the text that ends a prompt, or leave '
            "it out for a prompt a line.",
        )


@CHECKS.reading("model_parallel_size", "pipe_parallel_size", purposes=("serve",))
def _one_copy_is_served(config: NeoXConfig) -> Findings:
    if config.dp > 1:
        yield (
            "world_size",
            f"serve.py serves one copy of the model, of {config.tp * config.pp} processes, and "
            f"there are {config.world_size}. Set num_gpus to {config.tp * config.pp}, or start a "
            "server for each copy.",
        )


@CHECKS.reading("serve_max_prompt_tokens", "seq_length", purposes=("serve",))
def _prompts_leave_room(config: NeoXConfig) -> Findings:
    longest = config.serve_max_prompt_tokens
    if longest is not None and longest >= config.seq_length:
        yield (
            "serve_max_prompt_tokens",
            f"serve_max_prompt_tokens ({longest}) leaves no room to generate in seq_length "
            f"({config.seq_length}). Give at most {config.seq_length - 1}.",
        )


@CHECKS.reading("adapter", "adapters", purposes=("serve",))
def _adapters_are_of_one_base(config: NeoXConfig) -> Findings:
    if config.adapter is not None and config.adapters:
        yield (
            "adapter",
            f"adapter is {show(config.adapter)}, part of the model that is served, and adapters "
            "are for the model without it. Drop adapter, or give it a name among adapters.",
        )


@CHECKS.reading("adapters", purposes=("serve",))
def _adapters_have_folders(config: NeoXConfig) -> Findings:
    for name, folder in (config.adapters or {}).items():
        if not isinstance(folder, str):
            yield (
                f"adapters.{name}",
                f"adapters.{name} is {show(folder)}, but it must be the path of an adapter's "
                "folder.",
            )
