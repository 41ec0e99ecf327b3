"""What a user is told about a broken configuration, word for word."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from neox.config import Override, load_config
from neox.errors import ConfigError
from tests.config.runs import make_files, write


@dataclass(frozen=True)
class Case:
    name: str
    text: str | bytes  # of a.yml; the other keys of a good run follow it
    message: str
    without: tuple[str, ...] = ()
    purpose: str = "train"
    overrides: tuple[tuple[str, Any, str], ...] = ()


CASES = [
    # ---- names
    Case(
        "a typo at the top level",
        "num_layer: 24",
        "a.yml:1: num_layer is not a key. Did you mean num_layers?",
    ),
    Case(
        "a typo in capitals",
        "Train-Iters: 100",
        "a.yml:1: Train_Iters is not a key. Did you mean train_iters?",
        without=(),
    ),
    Case(
        "a key with a space",
        "train iterations: 100",
        "a.yml:1: train iterations is not a key. Did you mean train_iters?",
    ),
    Case(
        "a key like no other",
        "\nflavour: vanilla",
        "a.yml:2: flavour is not a key. docs/configuration.md lists them all.",
    ),
    Case("an empty key", '"": 1', "a.yml:1: a key is empty."),
    Case(
        "a typo in the optimizer",
        "optimizer:\n  type: Adam\n  param: {lr: 1.0e-3}",
        "a.yml:3: optimizer.param is not a key of optimizer. Did you mean params?",
    ),
    Case(
        "a typo two levels down",
        "optimizer:\n  type: Adam\n  params:\n    lr: 1.0e-3\n    beta: [0.9, 0.95]",
        "a.yml:5: optimizer.params.beta is not a key of optimizer.params. Did you mean betas?",
    ),
    Case(
        "a parameter of another optimizer",
        "optimizer:\n  type: SGD\n  params:\n    lr: 1.0e-3\n    eps: 1.0e-8",
        "a.yml:5: optimizer.params.eps is not a key of optimizer.params. It takes lr, momentum and "
        "nesterov.",
    ),
    Case(
        "a typo that DeepSpeed would swallow",
        "zero_optimisation: {stage: 1}",
        "a.yml:1: zero_optimisation is not a key. Did you mean zero_optimization?",
    ),
    Case(
        "a typo inside zero_optimization",
        "zero_optimization:\n  stage: 1\n  allgather_bucketsize: 500000000",
        "a.yml:3: zero_optimization.allgather_bucketsize is not a key of zero_optimization. "
        "Did you mean allgather_bucket_size?",
    ),
    Case(
        "a typo inside fp16",
        "fp16: {enabled: true, loss_scale_windows: 1000}",
        "a.yml:1: fp16.loss_scale_windows is not a key of fp16. Did you mean loss_scale_window?",
    ),
    Case(
        "a typo inside bf16",
        "bf16: {enable: true}",
        "a.yml:1: bf16.enable is not a key of bf16. Did you mean enabled?",
    ),
    Case(
        "a typo inside an ignored block",
        "activation_checkpointing: {partition_activation: true}",
        "a.yml:1: activation_checkpointing.partition_activation is not a key of "
        "activation_checkpointing. Did you mean partition_activations?",
    ),
    Case(
        "a nested key at the top level",
        "betas: [0.9, 0.95]",
        "a.yml:1: betas is not a key. It belongs in optimizer.params.",
    ),
    Case(
        "a top-level key in a block",
        "optimizer: {params: {lr: 1.0e-3, weight_decay: 0.1}}",
        "a.yml:1: optimizer.params.weight_decay is not a key of optimizer.params. It belongs at "
        "the top level.",
    ),
    Case(
        "a former name",
        "save-interval: 50",
        "a.yml:1: save_interval is not a key. Use checkpoint_factor.",
    ),
    Case(
        "a fork's name",
        "decay_lr_to: 0.1",
        "a.yml:1: decay_lr_to is not a key. Use min_lr: the rate itself, not a share of it.",
    ),
    Case(
        "an unknown key for DeepSpeed",
        "deepspeed_extra_args: {wall_clock_brakedown: true}",
        "a.yml:1: deepspeed_extra_args.wall_clock_brakedown is not a key of deepspeed_extra_args. "
        "Did you mean wall_clock_breakdown?",
    ),
    Case(
        "an unknown key on the command line",
        "",
        "--set: train_iter is not a key. Did you mean train_iters?",
        overrides=(("train_iter", 5, "--set"),),
    ),
    # ---- logging
    Case(
        "a profile of no iteration",
        "profile: true\nlog_dir: logs\nprofile_step_start: 5\nprofile_step_stop: 5",
        "a.yml:4: profile_step_stop (5) is not after profile_step_start (5), the first iteration "
        "that is profiled: nothing would be.",
    ),
    Case(
        "a profile without a place",
        "profile: true",
        "a.yml:1: profile needs a folder for its trace: set tensorboard_dir or log_dir.",
    ),
    # ---- keys that come twice
    Case(
        "a key twice",
        "seed: 1\ntrain_iters: 100\nseed: 2",
        "a.yml:3: seed stands here and on line 1. Keep one of them.",
    ),
    Case(
        "a key twice, once with a hyphen",
        "train_iters: 100\ntrain-iters: 200",
        "a.yml:2: train_iters stands here and on line 1. Keep one of them.",
    ),
    Case(
        "a nested key twice, once with a hyphen",
        "zero_optimization:\n  stage: 1\n  overlap-comm: true\n  overlap_comm: false",
        "a.yml:4: zero_optimization.overlap_comm stands here and on line 3. Keep one of them.",
    ),
    Case(
        "DeepSpeed told twice",
        "gradient_clipping: 1.0\ndeepspeed_extra_args: {gradient_clipping: 2.0}",
        "a.yml:2: deepspeed_extra_args.gradient_clipping is also given at a.yml:1. Keep one of "
        "them.",
    ),
    # ---- types and ranges
    Case(
        "text where a number belongs",
        "hidden_size: wide",
        'a.yml:1: hidden_size is "wide", but it must be an integer.',
    ),
    Case(
        "a comma from another style",
        "hidden_size: 1024,",
        'a.yml:1: hidden_size is "1024,", but it must be an integer. Did you mean 1024?',
    ),
    Case(
        "a number in quotes",
        'hidden_size: "1024"',
        'a.yml:1: hidden_size is "1024", but it must be an integer. Write 1024, without quotes.',
    ),
    Case(
        "a learning rate in quotes",
        "optimizer:\n  params:\n    lr: '6e-4'",
        'a.yml:3: optimizer.params.lr is "6e-4", but it must be a number. Write 6e-4, without '
        "quotes.",
    ),
    Case(
        "an underscore for a minus",
        "optimizer: {params: {lr: 1.0e-3, eps: 1.0e_8}}",
        'a.yml:1: optimizer.params.eps is "1.0e_8", but it must be a number. Did you mean 1.0e-8?',
    ),
    Case(
        "a fraction where a whole number belongs",
        "train_iters: 99.5",
        "a.yml:1: train_iters is 99.5, but it must be an integer.",
    ),
    Case(
        "a whole number written as a fraction",
        "train_iters: 1e3",
        "a.yml:1: train_iters is 1000.0, but it must be an integer. Write 1000.",
    ),
    Case(
        "a truth value where a number belongs",
        "num_layers: true",
        "a.yml:1: num_layers is true, but it must be an integer.",
    ),
    Case(
        "a number where a truth value belongs",
        "no_weight_tying: 1",
        "a.yml:1: no_weight_tying is 1, but it must be true or false. Write true.",
    ),
    Case(
        "a number where text belongs",
        "wandb_group: 2024",
        'a.yml:1: wandb_group is 2024, but it must be text. Write "2024", in quotes.',
    ),
    Case(
        "None, which is text in YAML",
        "wandb_team: None",
        'a.yml:1: wandb_team is "None", which YAML reads as text. Write null for no value.',
    ),
    Case(
        "no such choice",
        "lr_decay_style: cosin",
        'a.yml:1: lr_decay_style is "cosin", but it must be one of constant, linear, cosine, '
        "exponential or wsd. Did you mean cosine?",
    ),
    Case(
        "another name of a choice",
        "precision: bf16",
        'a.yml:1: precision is "bf16", but it must be one of fp16, fp32 or bfloat16. Did you mean '
        "bfloat16?",
    ),
    Case(
        "text where a list belongs",
        "eval_tasks: lambada",
        'a.yml:1: eval_tasks is "lambada", but it must be a list of texts. Write ["lambada"].',
    ),
    Case(
        "an item of the wrong type",
        "extra_save_iters: [0, ten]",
        'a.yml:1: extra_save_iters is [0, "ten"], but item 2, "ten", must be an integer.',
    ),
    Case(
        "a list where text belongs",
        "split: [969, 30, 1]",
        'a.yml:1: split is [969, 30, 1], but it must be text. Write "969, 30, 1".',
    ),
    Case(
        "a number where a block belongs",
        "optimizer: 0.001",
        "a.yml:1: optimizer is 0.001, but it must be a block of keys.",
    ),
    Case("negative", "num_layers: -4", "a.yml:1: num_layers is -4, but it must be 1 or more."),
    Case(
        "above its range",
        "attention_dropout: 1.5",
        "a.yml:1: attention_dropout is 1.5, but it must be 1 or less.",
    ),
    Case(
        "outside a range open below",
        "rotary_pct: 0",
        "a.yml:1: rotary_pct is 0, but it must be more than 0 and at most 1.",
    ),
    Case(
        "infinite",
        "gradient_clipping: .inf",
        "a.yml:1: gradient_clipping is inf, but it must be a finite number.",
    ),
    Case(
        "beyond any use",
        f"train_iters: 1{'0' * 400}",
        f"a.yml:1: train_iters is 1{'0' * 55} ..., which does not fit into 64 bits.",
    ),
    Case(
        "a null that is needed",
        "hidden_size: null",
        "a.yml:1: hidden_size is missing. It is needed: Width of the residual stream.",
    ),
    # ---- keys that are refused
    Case(
        "a model of another kind",
        "moe_num_experts: 8",
        "a.yml:1: moe_num_experts is 8, which is refused: mixture-of-experts layers are not "
        "supported.",
    ),
    Case(
        "a value that is refused",
        "pos_emb: alibi",
        'a.yml:1: pos_emb is "alibi", which is refused: it is not supported. Use rotary, learned '
        "or none.",
    ),
    Case(
        "a split that gave wrong losses",
        "output_layer_parallelism: row",
        'a.yml:1: output_layer_parallelism is "row", which is refused: it gave wrong losses '
        "upstream and was removed there. Use column.",
    ),
    Case(
        "an optimizer that is not there",
        "optimizer: {type: Adagrad, params: {lr: 1.0e-4}}",
        'a.yml:1: optimizer.type is "Adagrad", which is not an optimizer. Use adamw, adam, '
        "cpu_adam, cpu_torch_adam, sgd, lion or madgrad_wd.",
    ),
    Case(
        "an optimizer with a typo",
        "optimizer: {type: Loin, params: {lr: 1.0e-4}}",
        'a.yml:1: optimizer.type is "Loin", which is not an optimizer. Did you mean lion?',
    ),
    Case(
        "an optimizer that needs CUDA's collectives",
        "optimizer: {type: OneBitAdam, params: {lr: 1.0e-4}}",
        'a.yml:1: optimizer.type is "OneBitAdam", which is refused: it compresses what NCCL '
        "sends, on CUDA only, and knows no ZeRO. Use Adam.",
    ),
    Case(
        "an optimizer whose steps would depend on the grid",
        "optimizer: {type: SM3, params: {lr: 1.0e-4}}",
        'a.yml:1: optimizer.type is "SM3", which is refused: it keeps a number for each row and '
        "column of a matrix, and its steps would depend on how ZeRO and tensor parallelism cut "
        "the matrices. Use Adam with use_bnb_optimizer: true, which needs little memory too.",
    ),
    Case(
        "8-bit state for an optimizer without",
        "use_bnb_optimizer: true\noptimizer: {type: Lion, params: {lr: 1.0e-4}}",
        "a.yml:1: use_bnb_optimizer is true, but the optimizer is lion, and only adam has 8-bit "
        "state. Drop one of them.",
    ),
    Case(
        "8-bit state for an Adam without decoupled decay",
        "use_bnb_optimizer: true\noptimizer: {params: {lr: 1.0e-4, adam_w_mode: false}}",
        "a.yml:2: optimizer.params.adam_w_mode is false, but use_bnb_optimizer is true, and "
        "bitsandbytes' Adam decays the weights themselves. Drop one of them.",
    ),
    Case(
        "Nesterov's momentum without momentum",
        "optimizer: {type: SGD, params: {lr: 0.1, nesterov: true}}",
        "a.yml:1: optimizer.params.nesterov is true, but optimizer.params.momentum is 0. Give a "
        "momentum, such as 0.9.",
    ),
    Case(
        "two schedules to resume with",
        "override_lr_scheduler: true\nuse_checkpoint_lr_scheduler: true",
        "a.yml:2: use_checkpoint_lr_scheduler is true, which takes the checkpoint's schedule, but "
        "override_lr_scheduler is true, which takes this one. Keep one of them.",
    ),
    Case(
        "a warm-up that leaves no room for the decay",
        "lr_decay_style: WSD\nwarmup: 0.5\nwsd_decay_ratio: 0.6",
        "a.yml:3: wsd_decay_ratio is 0.6, but warmup is 0.5: together they take more than all "
        "iterations. Lower one of them.",
    ),
    Case(
        "a layer kind that is not there",
        "attention_config: [[[gmlp], all]]",
        'a.yml:1: attention_config holds "gmlp", which is not supported. Use "global" or "flash", '
        "which are the same.",
    ),
    Case(
        "a key DeepSpeed renamed",
        "zero_optimization: {stage: 1, cpu_offload: true}",
        "a.yml:1: zero_optimization.cpu_offload is true, which is refused: DeepSpeed renamed it. "
        "Use offload_optimizer: {device: cpu}.",
    ),
    Case(
        "DeepSpeed's own schedule",
        "scheduler: {type: WarmupLR}",
        'a.yml:1: scheduler is {"type": "WarmupLR"}, which is refused: the schedule is set by '
        "lr_decay_style, lr_decay_iters, warmup and min_lr.",
    ),
    # ---- sizes that do not fit each other
    Case(
        "heads that don't divide the width",
        "num_attention_heads: 12\nhidden_size: 1024",
        "a.yml:2: hidden_size is 1024, but it is not divisible by num_attention_heads (12). Use 8 "
        "or 16 heads, or a hidden_size of 1020 or 1032.",
    ),
    Case(
        "key/value heads that don't divide the heads",
        "num_kv_heads: 5",
        "a.yml:1: num_kv_heads is 5, but num_attention_heads (16) is not divisible by it. Use 1, "
        "2, 4, 8 or 16.",
    ),
    Case(
        "stages that don't divide the layers",
        "pipe_parallel_size: 5",
        "a.yml:1: pipe_parallel_size is 5, but num_layers (24) is not divisible by it. Use 1, 2, "
        "3, 4, 6, 8, 12 or 24.",
    ),
    Case(
        "more stages than layers",
        "pipe_parallel_size: 30\npipe_partition_method: uniform",
        "a.yml:1: pipe_parallel_size is 30, but there are only 24 layers (num_layers). Use 24 or "
        "less.",
    ),
    Case(
        "tensor parallelism that doesn't divide the heads",
        "model_parallel_size: 3",
        "a.yml:1: model_parallel_size is 3, but num_attention_heads (16) and the MLP's inner width "
        "(4096) are not divisible by it. Use 1, 2, 4, 8 or 16.",
    ),
    Case(
        "a world that the model doesn't divide",
        "model_parallel_size: 4\nnum_gpus: 6",
        "a.yml:2: the run has 6 processes, but one copy of the model takes model_parallel_size (4) "
        "x pipe_parallel_size (1) = 4. Use 4 or 8 processes, or, for 6, model_parallel_size: 2 and "
        "pipe_parallel_size: 3.",
    ),
    Case(
        "too few positions",
        "max_position_embeddings: 256",
        "a.yml:1: max_position_embeddings is 256, but seq_length is 512. Raise it to 512 or more, "
        "or shorten seq_length.",
    ),
    Case(
        "an odd number of rotated dimensions",
        "rotary_pct: 0.18",
        "a.yml:1: rotary_pct is 0.18, which rotates 11 of a head's 64 dimensions, but they are "
        "rotated in pairs. Choose it so that rotary_pct x 64 is even, such as 0.15625.",
    ),
    Case(
        "too few layer kinds",
        "attention_config: [[[global, flash], 6]]",
        "a.yml:1: attention_config names 12 layers, but num_layers is 24. Make them equal.",
    ),
    Case(
        "layer kinds out of shape",
        "attention_config: [[global, 24]]",
        'a.yml:1: attention_config holds ["global", 24], but each item must be a list of layer '
        'kinds and their repeats, such as [["global"], 24] or [["global"], "all"].',
    ),
    Case(
        "batch sizes that don't multiply",
        "train_batch_size: 100\ntrain_micro_batch_size_per_gpu: 4\n"
        "gradient_accumulation_steps: 2\nmodel_parallel_size: 2\nnum_gpus: 10",
        "a.yml:1: train_batch_size is 100, but train_micro_batch_size_per_gpu (4, a.yml:2) x "
        "gradient_accumulation_steps (2, a.yml:3) x data-parallel replicas (5 = 10 processes / 2 "
        "tensor-parallel / 1 pipeline stages) is 40. Set train_batch_size to 40, "
        "gradient_accumulation_steps to 5 or train_micro_batch_size_per_gpu to 10.",
    ),
    Case(
        "a batch that the micro-batch doesn't divide",
        "train_batch_size: 100\ntrain_micro_batch_size_per_gpu: 3\nnum_gpus: 2",
        "a.yml:1: train_batch_size is 100, but that is not divisible by "
        "train_micro_batch_size_per_gpu (3, a.yml:2) x data-parallel replicas (2) = 6. Set "
        "train_batch_size to 96 or 102 or train_micro_batch_size_per_gpu to 2 or 5.",
    ),
    Case(
        "a batch that the replicas don't divide",
        "train_batch_size: 7\nnum_gpus: 2",
        "a.yml:1: train_batch_size is 7, but that is not divisible by data-parallel replicas (2). "
        "Set train_batch_size to 6 or 8.",
        without=("train_micro_batch_size_per_gpu",),
    ),
    Case(
        "no batch size",
        "gradient_accumulation_steps: 2",
        "a.yml:1: train_micro_batch_size_per_gpu is missing. Give it, or train_batch_size: how "
        "many samples a forward pass takes, or an optimizer step.",
        without=("train_micro_batch_size_per_gpu",),
    ),
    # ---- keys that contradict each other
    Case(
        "two precisions",
        "precision: fp32\nfp16: {enabled: true}",
        'a.yml:1: precision is "fp32", but fp16.enabled is true. Drop one of them.',
    ),
    Case(
        "fp16 and bf16",
        "fp16: {enabled: true}\nbf16: {enabled: true}",
        "a.yml:2: bf16.enabled is true, but fp16.enabled is true as well. Keep one of them.",
    ),
    Case(
        "sharded gradients in a pipeline",
        "pipe_parallel_size: 1\nzero_optimization:\n  stage: 2",
        "a.yml:3: zero_optimization.stage is 2, but pipe_parallel_size is 1: the pipeline engine "
        "keeps whole gradients. Use stage 1, or pipe_parallel_size: 0.",
    ),
    Case(
        "sharded weights in a pipeline",
        "pipe_parallel_size: 1\nzero_optimization: {stage: 3}",
        "a.yml:2: zero_optimization.stage is 3, but pipe_parallel_size is 1: the pipeline engine "
        "keeps whole weights and gradients. Use stage 1, or pipe_parallel_size: 0.",
    ),
    Case(
        "state moved to the CPU that nothing shards",
        "optimizer: {params: {lr: 1.0e-3}}\n"
        "zero_optimization: {stage: 0, offload_optimizer: {device: cpu}}",
        'a.yml:2: zero_optimization.offload_optimizer is {"device": "cpu"}, but the stage is 0, '
        "which leaves the state where it is. Use stage 1, 2 or 3.",
    ),
    Case(
        "weights moved to the CPU that nothing shards",
        "zero_optimization: {stage: 2, offload_param: {device: cpu}}",
        'a.yml:1: zero_optimization.offload_param is {"device": "cpu"}, but the stage is 2, '
        "which leaves the weights where they are. Use stage 3.",
    ),
    Case(
        "gradients divided before they are scattered",
        "prescale_gradients: true\nzero_optimization: {stage: 2}",
        "a.yml:1: prescale_gradients is true, but zero_optimization.stage is 2, which scatters "
        "gradients and divides them afterwards. Use stage 0 or 1, or "
        "zero_optimization.reduce_scatter: false.",
    ),
    Case(
        "sequences that don't divide",
        "model_parallel_size: 2\nseq_length: 511\nsequence_parallel: true",
        "a.yml:3: sequence_parallel is true, but seq_length (511) is not divisible by "
        "model_parallel_size (2). Use a seq_length of 510 or 512, or 1, 7, 73 or 511 as "
        "model_parallel_size.",
    ),
    Case(
        "a floor above the peak",
        "min_lr: 1.0e-3",
        "a.yml:1: min_lr is 0.001, but it is above the peak, optimizer.params.lr (0.0003). Use "
        "3e-05, a tenth of the peak, or anything below it.",
    ),
    Case(
        "data named twice",
        "train_data_paths: &data [data/text_document]\nvalid_data_paths: *data\n"
        "test_data_paths: *data\ndata_path: data/text_document",
        'a.yml:4: data_path is "data/text_document", but there are train_data_paths, '
        "valid_data_paths and test_data_paths too. Keep data_path with split, or the three lists.",
    ),
    Case(
        "weights that don't match",
        "train_data_paths: &data [data/text_document]\nvalid_data_paths: *data\n"
        "test_data_paths: *data\ntrain_data_weights: [1.0, 2.0]",
        "a.yml:4: train_data_weights holds 2 weights, but train_data_paths holds 1 path. Give one "
        "weight for each path.",
        without=("data_path",),
    ),
    Case(
        "weights whose sum is no number",
        "train_data_paths: [data/text_document, data/pile_text_document]\n"
        "valid_data_paths: &data [data/text_document]\ntest_data_paths: *data\n"
        "train_data_weights: [1.0e+308, 1.0e+308]",
        "a.yml:4: train_data_weights is [1e+308, 1e+308], but weights are 0 or more, and not all "
        "0.",
        without=("data_path",),
    ),
    Case(
        "epochs of weighted datasets",
        "train_data_paths: &data [data/text_document]\nvalid_data_paths: *data\n"
        "test_data_paths: *data\ntrain_data_weights: [2.0]\ntrain_epochs: 1",
        "a.yml:5: train_epochs is 1, which reads every document as often, but train_data_weights "
        "([2.0]) reads some datasets more often than others. Drop one of them.",
        without=("data_path", "train_iters"),
    ),
    Case(
        "epochs of counted datasets",
        "train_data_paths: &data [data/text_document]\nvalid_data_paths: *data\n"
        "test_data_paths: *data\nweight_by_num_documents: true\ntrain_epochs: 1",
        "a.yml:5: train_epochs is 1, which reads every document as often, but "
        "weight_by_num_documents (true) reads some datasets more often than others. Drop one of "
        "them.",
        without=("data_path", "train_iters"),
    ),
    Case(
        "turns without a template",
        "fewshot_as_multiturn: true",
        "a.yml:1: fewshot_as_multiturn is true, but only a chat template has turns. Set "
        "apply_chat_template: true as well.",
    ),
    Case(
        "tasks from nowhere",
        "include_path: chekpoints\neval_tasks: [mine]",
        'a.yml:1: include_path is "chekpoints", but there is no such folder. Did you mean '
        '"checkpoints"?',
        purpose="evaluate",
    ),
    Case(
        "labels without their texts",
        "train_label_data_paths: [data/text_document]",
        "a.yml:1: train_label_data_paths is given, but train_data_paths is missing. Labels go with "
        "datasets of their own: name both, in the same order.",
    ),
    Case(
        "labels that don't match",
        "train_data_paths: &data [data/text_document]\nvalid_data_paths: *data\n"
        "test_data_paths: *data\n"
        "train_label_data_paths: [data/text_document, data/text_document]",
        "a.yml:4: train_label_data_paths holds 2 paths, but train_data_paths holds 1. Give one for "
        "each, in the same order.",
        without=("data_path",),
    ),
    Case(
        "labels that are not there",
        "train_data_paths: &data [data/text_document]\nvalid_data_paths: *data\n"
        "test_data_paths: *data\nvalid_label_data_paths: [data/labels]",
        'a.yml:4: valid_label_data_paths holds "data/labels", but data/labels.bin and '
        "data/labels.idx do not exist. In data there is pile_text_document and text_document.",
        without=("data_path",),
    ),
    Case(
        "shares that are no numbers",
        "split: most, some",
        'a.yml:1: split is "most, some", but it must be the shares of training, validation and '
        'test, numbers of 0 or more that are not all 0, such as "969, 30, 1".',
    ),
    Case(
        "shares of nothing",
        'split: "0, 0, 0"',
        'a.yml:1: split is "0, 0, 0", but it must be the shares of training, validation and test, '
        'numbers of 0 or more that are not all 0, such as "969, 30, 1".',
    ),
    # ---- what a purpose needs
    Case(
        "no model",
        b"train_iters: 100\n",
        "num_layers, hidden_size, num_attention_heads, seq_length and max_position_embeddings are "
        "missing from a.yml. Add a file that describes a model, such as configs/125M.yml.",
        purpose="generate",
        overrides=(
            ("load", "checkpoints", "--set"),
            ("tokenizer_type", "CharLevelTokenizer", "--set"),
        ),
    ),
    Case(
        "no end to training",
        "",
        "train_iters is missing. Say how many optimizer steps to take, or with train_epochs how "
        "often to go through the data.",
        without=("train_iters",),
    ),
    Case(
        "two ends to training",
        "train_iters: 100\ntrain_epochs: 2",
        "a.yml:2: train_epochs is 2, but train_iters (100) says as well how long to train. Keep "
        "one of them.",
        without=("train_iters",),
    ),
    Case(
        "no learning rate",
        "optimizer: {type: Adam}",
        'a.yml:1: optimizer.params.lr is missing. Give the peak learning rate, such as "optimizer":'
        ' {"type": "Adam", "params": {"lr": 6.0e-4}}.',
    ),
    Case(
        "a place to save and no time",
        "save: out",
        'a.yml:1: save is "out", but nothing says when to save. Give checkpoint_factor (every so '
        "many iterations) or extra_save_iters (a list of iterations).",
        without=("checkpoint_factor",),
    ),
    Case(
        "no data path",
        "",
        "data_path is missing. Name a tokenized dataset: the path of its .bin and .idx files "
        "without the ending. Or name texts as they are with finetune_data.",
        without=("data_path",),
    ),
    Case(
        "a data path that leads nowhere",
        "data_path: corpus/text_document",
        'a.yml:1: data_path is "corpus/text_document", but corpus/text_document.bin and '
        "corpus/text_document.idx do not exist. There is no folder corpus.",
    ),
    Case(
        "a data path beside the data",
        "data_path: data/texts",
        'a.yml:1: data_path is "data/texts", but data/texts.bin and data/texts.idx do not exist. '
        "In data there is pile_text_document and text_document.",
    ),
    Case(
        "a data path without its last part",
        "data_path: data/pile",
        'a.yml:1: data_path is "data/pile", but data/pile.bin and data/pile.idx do not exist. Did '
        'you mean "data/pile_text_document"?',
    ),
    Case(
        "a data path with an ending",
        "data_path: data/text_document.bin",
        'a.yml:1: data_path is "data/text_document.bin", but data/text_document.bin.bin and '
        'data/text_document.bin.idx do not exist. Leave .bin off: "data/text_document".',
    ),
    Case(
        "no vocabulary",
        "tokenizer_type: HFTokenizer",
        "vocab_file is missing: tokenizer_type HFTokenizer needs the tokenizer's .json file.",
        without=("vocab_file",),
        purpose="generate",
    ),
    Case(
        "a missing vocabulary file",
        "vocab_file: data/vocabs.json",
        'a.yml:1: vocab_file is "data/vocabs.json", but there is no such file. Did you mean '
        '"data/vocab.json"?',
    ),
    Case(
        "quantized training",
        "quantize: int8",
        "a.yml:1: quantize is int8, but quantized weights cannot be trained. Drop it; to train "
        "adapters of a model in 8 bits, use load_in_8bit and lora.",
    ),
    Case(
        "two ways of few bits",
        "quantize: int4\nload_in_8bit: true",
        "a.yml:1: quantize is int4 and load_in_8bit is true: a weight is held in one way. Use "
        "quantize to generate and evaluate, load_in_8bit to train adapters.",
        purpose="generate",
    ),
    Case(
        "a checkpoint folder that is not there",
        "load: checkpoint",
        'a.yml:1: load is "checkpoint", but there is no such folder. Did you mean "checkpoints"?',
        purpose="generate",
    ),
    Case(
        "a checkpoint folder without a checkpoint",
        "load: data",
        'a.yml:1: load is "data", but it holds no checkpoint. It holds merges.txt, '
        "pile_text_document.bin, pile_text_document.idx, text_document.bin, text_document.idx and "
        "vocab.json.",
        purpose="evaluate",
    ),
    Case(
        "one step of a checkpoint folder, and an empty one",
        "load: checkpoints/global_step50",
        'a.yml:1: load is "checkpoints/global_step50", but it holds no checkpoint. It is empty.',
        purpose="generate",
    ),
    Case(
        "a pointer to a step that is gone",
        "load: stale",
        'a.yml:1: load is "stale", but its file `latest` names "global_step9", which is not there. '
        "It holds latest.",
        purpose="generate",
    ),
    Case(
        "an iteration that was not saved",
        "",
        "--iteration: iteration is 75, but checkpoints holds no global_step75. It holds "
        "global_step50 and global_step100.",
        purpose="generate",
        overrides=(("iteration", 75, "--iteration"),),
    ),
    Case(
        "a name that is too long",
        f"vocab_file: {'x' * 300}",
        f"{'x' * 300} cannot be read: File name too long.",
    ),
    Case(
        "a missing file of prompts",
        "",
        '-i: sample_input_file is "prompts.txt", but there is no such file.',
        purpose="generate",
        overrides=(("sample_input_file", "prompts.txt", "-i"),),
    ),
    Case(
        "prompts from no file",
        "text_gen_type: input-file",
        'a.yml:1: text_gen_type is "input-file", but there is no sample_input_file. Name it with '
        "-i.",
        purpose="generate",
    ),
    # ---- files that are no configuration
    Case("an empty file", b"", "a.yml:1: the file is empty: it holds no key."),
    Case("nothing but comments", b"# later\n", "a.yml:1: the file is empty: it holds no key."),
    Case(
        "binary garbage",
        b"\x89PNG\r\n\x1a\n\x00\x00",
        "a.yml:1: not text: byte 0x89 is not UTF-8.",
    ),
    Case(
        "control characters",
        b"seed: 1\n\x00\x01\x02",
        "a.yml:2: not text: it holds the control character '\\x00'.",
    ),
    Case(
        "a list",
        b"- num_layers: 2\n",
        "a.yml:1: the file holds a list, but a configuration is keys with values, such as "
        '"num_layers": 12.',
    ),
    Case(
        "a word",
        b"\nhello\n",
        'a.yml:2: the file holds the text "hello", but a configuration is keys with values, such '
        'as "num_layers": 12.',
    ),
    Case(
        "a missing comma",
        b'{\n  "num_layers": 24\n  "hidden_size": 1024\n}\n',
        "a.yml:3: not valid YAML: did not find expected ',' or '}' while parsing a flow mapping, "
        "which starts on line 1. A comma may be missing on the line before.",
    ),
    Case(
        "a missing brace",
        b'{\n  "num_layers": 24,\n',
        "a.yml:3: not valid YAML: did not find expected node content while parsing a flow node.",
    ),
    Case(
        "a tab",
        b"optimizer:\n\ttype: Adam\n",
        "a.yml:2: a tab stands where YAML wants spaces. Replace tabs with spaces.",
    ),
    Case(
        "a second document",
        b"seed: 1\n---\nseed: 2\n",
        "a.yml:2: a second document begins (---). A configuration file holds one.",
    ),
    Case("a number for a key", b"1: seed\n", "a.yml:1: the key 1 is not a name. Keys are words."),
    Case(
        "a tag that builds objects",
        b"seed: !!python/object/apply:os.system [ls]\n",
        "a.yml:1: the tag !!python/object/apply:os.system is not allowed.",
    ),
    Case(
        "an alias of itself",
        b"extra_save_iters: &a [1, *a]\n",
        "a.yml:1: an alias (*) refers to a value that contains it.",
    ),
    Case(
        "an alias of nothing",
        b"seed: *lost\n",
        "a.yml:1: not valid YAML: found undefined alias.",
    ),
]


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path)
    for ending in ("bin", "idx"):
        (tmp_path / "data" / f"pile_text_document.{ending}").touch()
    (tmp_path / "stale").mkdir()
    (tmp_path / "stale" / "latest").write_text("global_step9\n")
    return tmp_path


def refusal(*files: str, **arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config([Path(file) for file in files], **arguments)
    return str(caught.value)


def test_the_run_that_is_spoiled_is_good(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run_folder / "a.yml", "")
    for purpose in ("train", "generate", "evaluate"):
        load_config([Path("a.yml")], purpose=purpose)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_broken(case: Case, run_folder: Path) -> None:
    write(run_folder / "a.yml", case.text, without=case.without)
    overrides = {key: Override(value, origin) for key, value, origin in case.overrides}
    assert refusal("a.yml", overrides=overrides, purpose=case.purpose) == case.message


def test_there_are_fifty_of_them() -> None:
    assert len(CASES) >= 50
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_file_that_does_not_exist(run_folder: Path) -> None:
    (run_folder / "configs").mkdir()
    (run_folder / "configs" / "125M.yml").touch()
    assert refusal("configs/152M.yml") == (
        "configs/152M.yml does not exist. Did you mean configs/125M.yml?"
    )
    assert refusal("configs/760M") == (
        "configs/760M does not exist. Nor do 760M.yml, 760M.yaml and 760M.json."
    )
    assert refusal("config/125M.yml") == (
        "config/125M.yml does not exist. There is no folder config."
    )


def test_a_folder(run_folder: Path) -> None:
    (run_folder / "configs").mkdir()
    assert refusal("configs") == "configs is a folder, not a configuration file."
    (run_folder / "configs" / "125M.yml").touch()
    assert refusal("configs") == (
        "configs is a folder, not a configuration file. It holds 125M.yml."
    )


def test_a_key_in_two_files(run_folder: Path) -> None:
    write(run_folder / "a.yml", "seed: 1")
    (run_folder / "b.yml").write_text("num_gpus: 1\nSEED: 3\nse-ed: 2\n")
    assert "b.yml:2: SEED is not a key. Did you mean seed?" in refusal("a.yml", "b.yml")
    (run_folder / "b.yml").write_text("num_gpus: 1\ntrain-iters: 100\n")
    assert refusal("a.yml", "b.yml") == (
        "b.yml:2: train_iters is also given at a.yml:10. Keep one of them."
    )


def test_two_files_of_one_name(run_folder: Path) -> None:
    (run_folder / "sub").mkdir()
    write(run_folder / "a.yml", "seed: 1")
    (run_folder / "sub" / "a.yml").write_text("num_gpus: 1\n")
    assert refusal("a.yml", "sub/a.yml") == (
        "two files are called a.yml. Checkpoints keep both in one folder: rename one."
    )


def test_several_problems_come_together_and_in_order(run_folder: Path) -> None:
    write(
        run_folder / "model.yml",
        "num_attention_heads: 12\nmax_position_embeddings: 128\nnorm: batchnorm\nnorn: rmsnorm",
        without=("save", "load", "checkpoint_factor"),
    )
    (run_folder / "local.yml").write_text("save: out\nmin_lrs: 2\nseed: 1\nseed: 2\nload: lost\n")
    overrides = {"pipe_parallel_size": Override(7, "--set")}
    message = refusal("model.yml", "local.yml", overrides=overrides, purpose="train")
    assert message.splitlines() == [
        "8 problems in the configuration:",
        "  model.yml:2: max_position_embeddings is 128, but seq_length is 512. Raise it to 512 or "
        "more, or shorten seq_length.",
        '  model.yml:3: norm is "batchnorm", but it must be one of layernorm, rmsnorm, '
        "non_parametric_layernorm, scalenorm, te_rmsnorm or te_layernorm.",
        "  model.yml:4: norn is not a key. Did you mean norm?",
        "  model.yml:6: hidden_size is 1024, but it is not divisible by num_attention_heads (12). "
        "Use 8 or 16 heads, or a hidden_size of 1020 or 1032.",
        '  local.yml:1: save is "out", but nothing says when to save. Give checkpoint_factor '
        "(every so many iterations) or extra_save_iters (a list of iterations).",
        "  local.yml:2: min_lrs is not a key. Did you mean min_lr?",
        "  local.yml:4: seed stands here and on line 3. Keep one of them.",
        "  --set: pipe_parallel_size is 7, but num_layers (24) is not divisible by it. Use 1, 2, "
        "3, 4, 6, 8, 12 or 24.",
    ]


def test_one_mistake_is_reported_once(run_folder: Path) -> None:
    """A value that could not be read takes no part in the checks of other values."""
    write(run_folder / "a.yml", "num_layers: many\npipe_parallel_size: 5\nnum_gpus: two")
    message = refusal("a.yml", purpose="train")
    assert message.splitlines()[1:] == [
        '  a.yml:1: num_layers is "many", but it must be an integer.',
        '  a.yml:3: num_gpus is "two", but it must be an integer.',
    ]


def test_all_unreadable_files_are_named(run_folder: Path) -> None:
    (run_folder / "a.yml").write_text("")
    assert refusal("a.yml", "b.yml").splitlines() == [
        "2 problems in the configuration:",
        "  a.yml:1: the file is empty: it holds no key.",
        "  b.yml does not exist. Did you mean a.yml?",
    ]
