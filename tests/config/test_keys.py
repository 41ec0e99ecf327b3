"""The keys, frozen: adding, dropping or changing one has to be done here too, on purpose."""

from __future__ import annotations

import json

import pytest

from neox.config import NeoXConfig
from neox.config.config import SECTIONS
from neox.config.fields import keys_of
from neox.config.values import describe_type

# section: name, status, default ("!" when it is required)
FROZEN = {
    "ModelConfig": r"""
        num_layers                                acts     !
        hidden_size                               acts     !
        num_attention_heads                       acts     !
        seq_length                                acts     !
        max_position_embeddings                   acts     !
        precision                                 acts     null
        num_kv_heads                              acts     null
        attention_config                          acts     null
        sliding_window_width                      acts     null
        attention_dropout                         acts     0.0
        attention_softmax_in_fp32                 ignored  false
        apply_query_key_layer_scaling             ignored  false
        use_qk_layernorm                          refused  false
        sparsity_config                           refused  null
        pos_emb                                   acts     "learned"
        rotary_pct                                acts     1.0
        rotary_emb_base                           acts     10000
        rotary_interleaved                        acts     false
        rotary_save_freqs_buffer                  ignored  false
        rpe_num_buckets                           refused  32
        rpe_max_distance                          refused  128
        opt_pos_emb_offset                        refused  0
        norm                                      acts     "layernorm"
        layernorm_epsilon                         acts     1e-05
        rms_norm_epsilon                          acts     1e-08
        scalenorm_epsilon                         refused  1e-08
        layernorm_fusion                          ignored  false
        rmsnorm_fusion                            ignored  false
        use_bias_in_norms                         ignored  true
        activation                                acts     "gelu"
        intermediate_size                         acts     null
        expansion_factor                          acts     null
        mlp_multiple_of                           acts     1
        use_flashattn_swiglu                      ignored  false
        bias_gelu_fusion                          acts     false
        onnx_safe                                 ignored  false
        gpt_j_residual                            acts     false
        gpt_j_tied                                acts     false
        hidden_dropout                            acts     0.0
        use_bias_in_attn_linear                   acts     true
        use_bias_in_mlp                           acts     true
        no_weight_tying                           acts     false
        use_bias_in_final_linear                  acts     false
        make_vocab_size_divisible_by              acts     128
        output_layer_parallelism                  acts     "column"
        num_unique_layers                         ignored  null
        param_sharing_style                       ignored  "grouped"
        init_method                               acts     "normal"
        output_layer_init_method                  acts     "scaled_normal"
        init_method_std                           acts     0.02
        use_cpu_initialization                    ignored  false
        scaled_upper_triang_masked_softmax_fusion ignored  false
        scaled_masked_softmax_fusion              ignored  false
        bias_dropout_fusion                       ignored  false
        rope_fusion                               ignored  false
        fused_kernels_build_path                  ignored  null
        fp16_lm_cross_entropy                     ignored  false
        te_columnparallel                         ignored  false
        te_rowparallel                            ignored  false
        te_layernorm_mlp                          ignored  false
        te_mha                                    ignored  false
        te_fp8_format                             ignored  "hybrid"
        te_fp8_wgrad                              ignored  true
        te_fp8_amax_history_len                   ignored  1
        te_fp8_amax_compute_algo                  ignored  "most_recent"
        te_fp8_margin                             ignored  0
        te_fp8_mha                                ignored  false
        soft_prompt_tuning                        refused  null
        gmlp_attn_dim                             refused  64
        mamba_selective_scan_fusion               refused  false
        mamba_causal_conv_fusion                  refused  false
        mamba_inner_func_fusion                   refused  false
        mamba_selective_fp32_params               refused  true
        mamba_use_bias_in_conv                    refused  true
        mamba_use_bias_in_linears                 refused  false
        dim_att                                   refused  null
        head_size                                 refused  null
        ffn_dim                                   refused  null
        serve_model_weights                       refused  false
        weight_server_port                        refused  6000
        online_dataserver_ips                     refused  "localhost"
        online_dataserver_ports                   refused  10000
    """,
    "ParallelConfig": r"""
        pipe_parallel_size                        acts     0
        model_parallel_size                       acts     1
        pipe_partition_method                     acts     "type:transformer|mlp"
        sequence_parallel                         acts     false
        world_size                                derived  1
        is_pipe_parallel                          derived  false
    """,
    "OptimizerConfig": r"""
        optimizer                                 acts     null
        optimizer_type                            acts     "adam"
        use_bnb_optimizer                         acts     false
        weight_decay                              acts     0.1
        gradient_clipping                         acts     1.0
        lr                                        derived  0.001
        zero_stage                                derived  0
        zero_reduce_scatter                       ignored  null
        zero_contiguous_gradients                 ignored  null
        zero_reduce_bucket_size                   ignored  null
        zero_allgather_bucket_size                ignored  null
    """,
    "LRSchedulerConfig": r"""
        lr_decay_style                            acts     "linear"
        wsd_decay_ratio                           acts     0.1
        wsd_decay_style                           acts     "cosine"
        lr_decay_iters                            acts     null
        lr_decay_fraction                         acts     null
        min_lr                                    acts     0.0
        warmup                                    acts     0.01
        override_lr_scheduler                     acts     false
        use_checkpoint_lr_scheduler               acts     false
    """,
    "TrainingConfig": r"""
        train_iters                               acts     null
        train_epochs                              acts     null
        exit_interval                             acts     null
        eval_interval                             acts     1000
        eval_iters                                acts     100
        char_level_ppl                            acts     false
        train_impl                                acts     "normal"
        save                                      acts     null
        load                                      acts     null
        checkpoint_factor                         acts     null
        checkpoint_scale                          acts     "linear"
        extra_save_iters                          acts     null
        keep_last_n_checkpoints                   acts     null
        finetune                                  acts     false
        no_load_optim                             acts     false
        no_load_rng                               ignored  false
        no_save_rng                               ignored  false
        no_save_optim                             ignored  false
        checkpoint_validation_with_forward_pass   acts     false
        s3_path                                   refused  null
        s3_chunk_size                             refused  104857600
        checkpoint_activations                    acts     false
        checkpoint_num_layers                     acts     1
        partition_activations                     acts     false
        checkpoint_in_cpu                         acts     false
        contiguous_checkpointing                  ignored  false
        synchronize_each_layer                    ignored  false
        profile_backward                          ignored  false
        deepspeed_activation_checkpointing        ignored  true
        clip_grad                                 ignored  1.0
        hysteresis                                ignored  2
        dynamic_loss_scale                        ignored  null
        loss_scale                                ignored  null
        loss_scale_window                         ignored  1000.0
        min_scale                                 ignored  1.0
        batch_size                                derived  null
        dpo_fp32                                  refused  true
        dpo_reference_free                        refused  false
        dpo_beta                                  refused  0.1
        kto_fp32                                  refused  true
        kto_desirable_weight                      refused  1.0
        kto_undesirable_weight                    refused  1.0
        kto_beta                                  refused  0.1
        z_loss                                    refused  0.0
        fp32_reinforce                            refused  true
        kl_impl                                   refused  "mse"
        kl_div_beta                               refused  0.1
        reinforce_leave_one_out                   refused  false
        use_mup                                   refused  false
        coord_check                               refused  false
        save_base_shapes                          refused  false
        base_shapes_file                          refused  null
        mup_init_scale                            refused  1.0
        mup_embedding_mult                        refused  1.0
        mup_rp_embedding_mult                     refused  1.0
        mup_width_scale                           refused  2
        mup_attn_temp                             ignored  1.0
        mup_output_temp                           ignored  1.0
    """,
    "DataConfig": r"""
        data_path                                 acts     null
        split                                     acts     "969, 30, 1"
        train_data_paths                          acts     null
        valid_data_paths                          acts     null
        test_data_paths                           acts     null
        train_data_weights                        acts     null
        valid_data_weights                        acts     null
        test_data_weights                         acts     null
        weight_by_num_documents                   acts     false
        weighted_sampler_alpha                    acts     1.0
        finetune_data                             acts     null
        finetune_valid_data                       acts     null
        finetune_text_per                         acts     "line"
        data_impl                                 acts     "infer"
        pack_impl                                 acts     "packed"
        dataset_impl                              acts     "gpt2"
        allow_chopped                             acts     true
        eod_mask_loss                             acts     false
        num_workers                               acts     2
        mmap_warmup                               acts     false
        use_shared_fs                             acts     true
        train_label_data_paths                    acts     null
        valid_label_data_paths                    acts     null
        test_label_data_paths                     acts     null
        train_reward_data_paths                   refused  null
        valid_reward_data_paths                   refused  null
        test_reward_data_paths                    refused  null
        pos_train_data_paths                      refused  null
        neg_train_data_paths                      refused  null
        pos_valid_data_paths                      refused  null
        neg_valid_data_paths                      refused  null
        pos_test_data_paths                       refused  null
        neg_test_data_paths                       refused  null
        pos_train_label_data_paths                refused  null
        neg_train_label_data_paths                refused  null
        pos_valid_label_data_paths                refused  null
        neg_valid_label_data_paths                refused  null
        pos_test_label_data_paths                 refused  null
        neg_test_label_data_paths                 refused  null
        config_files                              derived  null
    """,
    "TokenizerConfig": r"""
        tokenizer_type                            acts     "GPT2BPETokenizer"
        vocab_file                                acts     null
        merge_file                                acts     null
        padded_vocab_size                         derived  null
    """,
    "LoggingConfig": r"""
        log_interval                              acts     100
        log_dir                                   acts     null
        tensorboard_dir                           acts     null
        peak_theoretical_tflops                   acts     null
        log_param_norm                            acts     false
        log_grad_norm                             acts     false
        log_grad_pct_zeros                        acts     false
        log_optimizer_states                      acts     false
        log_gradient_noise_scale                  ignored  false
        gradient_noise_scale_n_batches            ignored  5
        gradient_noise_scale_cpu_offload          ignored  false
        git_hash                                  derived  null
        use_wandb                                 acts     null
        wandb_group                               acts     null
        wandb_run_name                            acts     null
        wandb_team                                acts     null
        wandb_project                             acts     "neox"
        wandb_host                                acts     "https://api.wandb.ai"
        wandb_init_all_ranks                      ignored  false
        use_comet                                 ignored  null
        comet_workspace                           ignored  null
        comet_project                             ignored  null
        comet_experiment_name                     ignored  null
        comet_tags                                ignored  null
        comet_others                              ignored  null
        comet_experiment                          derived  null
        profile                                   acts     false
        profile_step_start                        acts     10
        profile_step_stop                         acts     12
        memory_profiling                          acts     false
        memory_profiling_path                     acts     null
    """,
    "TextGenConfig": r"""
        text_gen_type                             acts     "unconditional"
        temperature                               acts     0.0
        top_p                                     acts     0.0
        top_k                                     acts     0
        maximum_tokens                            acts     64
        generate_batch_size                       acts     16
        compile_decoding                          acts     null
        num_samples                               acts     1
        prompt_end                                acts     "\n"
        sample_input_file                         acts     null
        sample_output_file                        acts     "samples.txt"
        return_logits                             acts     false
        recompute                                 acts     false
        precompute_model_name                     refused  null
    """,
    "FrozenConfig": r"""
        lora                                      acts     null
        adapter                                   acts     null
        load_in_8bit                              acts     false
        quantize                                  acts     "none"
    """,
    "EvaluationConfig": r"""
        eval_tasks                                acts     null
        eval_results_prefix                       acts     ""
        eval_batch_size                           acts     null
        eval_data_dir                             acts     null
        eval_own_documents                        acts     false
        eval_cache_dir                            acts     null
        eval_use_cache                            acts     true
        include_path                              acts     null
        apply_chat_template                       acts     false
        chat_template_path                        acts     null
        system_instruction                        acts     null
        fewshot_as_multiturn                      acts     false
        num_fewshot                               acts     null
        limit                                     acts     null
    """,
    "ServingConfig": r"""
        serve_host                                acts     "127.0.0.1"
        serve_port                                acts     8000
        serve_rows                                acts     8
        serve_queue                               acts     64
        serve_max_prompt_tokens                   acts     null
        serve_max_tokens                          acts     null
        serve_max_body                            acts     1048576
        serve_request_timeout                     acts     600.0
        serve_io_timeout                          acts     20.0
        serve_connections                         acts     256
        serve_grace                               acts     30.0
        serve_api_keys_file                       acts     null
        serve_cors_origins                        acts     null
        legacy_double_json                        acts     false
        adapters                                  acts     null
    """,
    "MoEConfig": r"""
        moe_num_experts                           refused  1
        moe_expert_interval                       refused  1
        moe_top_k                                 refused  1
        moe_router_type                           refused  "sinkhorn"
        moe_jitter_eps                            refused  null
        moe_lbl_in_fp32                           ignored  false
    """,
    "DeepSpeedConfig": r"""
        train_batch_size                          acts     null
        train_micro_batch_size_per_gpu            acts     null
        gradient_accumulation_steps               acts     1
        zero_optimization                         acts     null
        fp16                                      acts     null
        bf16                                      acts     null
        data_types                                acts     null
        communication_data_type                   acts     null
        fp32_allreduce                            acts     false
        prescale_gradients                        acts     false
        gradient_predivide_factor                 acts     1.0
        flops_profiler                            acts     null
        checkpoint                                acts     null
        deepspeed_extra_args                      acts     null
        deepspeed                                 derived  true
        steps_per_print                           ignored  10
        wall_clock_breakdown                      acts     false
        dump_state                                ignored  false
        comms_logger                              ignored  null
        sparse_gradients                          ignored  false
        activation_checkpointing                  ignored  null
        tensorboard                               ignored  null
        wandb                                     ignored  null
        csv_monitor                               ignored  null
        scheduler                                 refused  null
        amp                                       refused  null
        curriculum_learning                       refused  null
        curriculum_seqlen                         derived  0
        data_efficiency                           refused  null
        sparse_attention                          refused  null
        autotuning                                refused  null
        elasticity                                refused  null
        compression_training                      refused  null
    """,
    "RunnerConfig": r"""
        hostfile                                  acts     null
        include                                   acts     null
        exclude                                   acts     null
        num_nodes                                 acts     -1
        num_gpus                                  acts     null
        master_port                               acts     29500
        master_addr                               acts     null
        launcher                                  acts     "pdsh"
        force_multi                               acts     false
        no_ssh_check                              acts     false
        restarts                                  acts     0
        watchdog_timeout                          acts     1800.0
        deepspeed_mpi                             acts     false
        deepspeed_slurm                           acts     false
        comment                                   acts     null
        account                                   acts     null
        autotuning_run                            refused  null
    """,
    "OtherConfig": r"""
        seed                                      acts     1234
        distributed_backend                       acts     "nccl"
        iteration                                 acts     null
        local_rank                                derived  null
        rank                                      derived  null
        global_num_gpus                           derived  null
        user_script                               derived  null
        do_train                                  derived  null
        do_valid                                  derived  null
        do_test                                   derived  null
        lazy_mpu_init                             ignored  false
        short_seq_prob                            ignored  0.1
        adlr_autoresume                           ignored  false
        adlr_autoresume_interval                  ignored  1000
        deepscale                                 ignored  false
        deepscale_config                          ignored  null
    """,
}
OURS = {  # the others are upstream's
    *("num_fewshot", "limit", "include_path", "system_instruction", "fewshot_as_multiturn"),
    *("eval_data_dir", "eval_own_documents", "eval_batch_size", "eval_cache_dir", "eval_use_cache"),
    *("apply_chat_template", "chat_template_path"),
    *("wsd_decay_ratio", "wsd_decay_style"),
    *("rotary_interleaved", "use_bias_in_final_linear"),
    *("lora", "adapter", "load_in_8bit", "quantize"),
    *("finetune_data", "finetune_valid_data", "finetune_text_per"),
    *("generate_batch_size", "compile_decoding"),
    *("serve_host", "serve_port", "serve_rows", "serve_queue", "serve_connections"),
    *("serve_max_prompt_tokens", "serve_max_tokens", "serve_max_body", "serve_grace"),
    *("serve_request_timeout", "serve_io_timeout", "serve_api_keys_file", "serve_cors_origins"),
    *("legacy_double_json", "adapters"),
    *("restarts", "watchdog_timeout"),
}


def table(section: str) -> dict[str, tuple[str, str]]:
    rows = [line.split(maxsplit=2) for line in FROZEN[section].strip().splitlines()]
    return {name: (status, default) for name, status, default in rows}


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_the_keys_of_a_section(section: type) -> None:
    declared = {
        name: (spec.status, "!" if spec.required else json.dumps(spec.default))
        for name, spec in keys_of(section).items()
    }
    assert declared == table(section.__name__)


def test_every_key_has_one_owner() -> None:
    names = [name for section in FROZEN for name in table(section)]
    assert len(names) == len(set(names)) == 318 + len(OURS)
    assert set(names) == set(keys_of(NeoXConfig))


def test_every_declaration_is_complete() -> None:
    for name, spec in keys_of(NeoXConfig).items():
        assert describe_type(spec.type), name
        assert (spec.status == "acts") == (spec.reason == ""), name
        assert spec.doc.endswith("."), name
        assert not spec.reason.endswith("."), f"{name}: messages end the sentence"
        for why in spec.refused.values():
            assert not why.endswith("."), f"{name}: messages end the sentence"
