"""Files and the command line become one configuration that knows where each value is from."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neox.config import (
    ModelConfig,
    NeoXConfig,
    Override,
    check_files,
    from_dict,
    load_config,
    parse_set,
)
from neox.config.deepspeed import to_deepspeed
from neox.errors import ConfigError
from tests.config.runs import make_files, write

MODEL = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "seq_length": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path)
    return tmp_path


# ---- files


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("125M.yml", "125M.yml"),
        ("125M.yml", "125M"),
        ("125M.yaml", "125M"),
        ("125M.json", "125M"),
        ("1.4B.yml", "1.4B"),
        ("plain", "plain"),
    ],
)
def test_names_without_a_suffix(file: str, named: str, run_folder: Path) -> None:
    write(run_folder / file, "seed: 7")
    assert load_config([Path(named)]).origin("seed") == f"{file}:1"


def test_a_folder_of_the_same_name_is_not_in_the_way(run_folder: Path) -> None:
    (run_folder / "pythia").mkdir()
    write(run_folder / "pythia.yml", "seed: 7")
    assert load_config([Path("pythia")]).seed == 7


def test_conf_dir_is_joined_with_every_name(run_folder: Path) -> None:
    folder = run_folder / "configs"
    folder.mkdir()
    write(folder / "model.yml", "seed: 7")
    (run_folder / "local.yml").write_text("num_gpus: 1\n")
    absolute = run_folder / "local.yml"
    config = load_config([Path("model"), absolute], conf_dir=Path("configs"))
    assert (config.seed, config.num_gpus) == (7, 1)
    assert list(config.config_files or {}) == ["model.yml", "local.yml"]
    assert (config.config_files or {})["local.yml"] == "num_gpus: 1\n"


def test_links_and_byte_order_marks(run_folder: Path) -> None:
    write(run_folder / "real.yml", "seed: 7")
    text = (run_folder / "real.yml").read_text()
    (run_folder / "real.yml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (run_folder / "link.yml").symlink_to("real.yml")
    assert load_config([Path("link.yml")]).origin("seed") == "link.yml:1"


def test_files_of_a_dataset_without_weight_need_not_be_there(run_folder: Path) -> None:
    paths = "[data/text_document, absent]"
    text = "".join(
        f"{split}_data_paths: {paths}\n{split}_data_weights: [1.0, 0.0]\n"
        f"{split}_label_data_paths: {paths}\n"
        for split in ("train", "valid", "test")
    )
    write(run_folder / "a.yml", text, without=("data_path",))
    load_config([Path("a.yml")], purpose="train")
    with pytest.raises(ConfigError, match='holds "absent", but'):
        load_config(
            [Path("a.yml")], {"weight_by_num_documents": Override(True, "x")}, purpose="train"
        )


def test_strict_json(run_folder: Path) -> None:
    (run_folder / "a.json").write_text(json.dumps(MODEL | {"seed": 7}, indent="\t"))
    config = load_config([Path("a.json")])
    assert config.seed == 7
    assert config.origin("seed") == "a.json:7"


# ---- values


def test_types_are_settled() -> None:
    config = from_dict(
        MODEL
        | {
            "hidden-dropout": 0,
            "norm": "RMSNorm",
            "checkpoint_factor": 5,
            "optimizer": {"type": "adam", "params": {"lr": 1}},
        }
    )
    assert type(config.hidden_dropout) is float
    assert config.norm == "rmsnorm"
    assert type(config.checkpoint_factor) is int
    assert (config.lr, config.optimizer_type) == (1.0, "adam")


def test_null_means_the_default() -> None:
    config = from_dict(MODEL | {"hidden_dropout": None, "hostfile": None, "optimizer": None})
    assert (config.hidden_dropout, config.hostfile, config.optimizer) == (0.0, None, None)
    assert config.origin("hidden_dropout") == "default"


def test_origins(run_folder: Path) -> None:
    write(run_folder / "a.yml", "seed: 1\nzero_optimization:\n  stage: 1")
    overrides = {
        "optimizer.params.lr": Override(6e-4, "--set"),
        "fp16.enabled": Override(True, "--set"),
        "iteration": Override(5, "--iteration"),
    }
    config = load_config([Path("a.yml")], overrides)
    assert config.origin("seed") == "a.yml:1"
    assert config.origin("zero_optimization.stage") == "a.yml:3"
    assert config.origin("zero_stage") == "derived"
    assert config.origin("optimizer.params.betas") == "a.yml:10"
    assert config.origin("optimizer.params.lr") == "--set"
    assert config.origin("lr") == "--set"
    assert config.origin("iteration") == "--iteration"
    assert config.origin("precision") == "derived"
    assert config.origin("train_batch_size") == "derived"
    assert config.origin("gradient_clipping") == "default"
    assert config.lr == 6e-4
    adam = {"lr": 6e-4, "betas": [0.9, 0.95], "eps": 1e-8, "adam_w_mode": True}
    assert config.optimizer_params == adam
    assert config.dtype == "float16"


def test_a_block_set_whole_forgets_the_lines_of_the_old_one(run_folder: Path) -> None:
    write(run_folder / "a.yml", "")
    optimizer = Override({"type": "SGD", "params": {"lr": 0.1}}, "--set")
    config = load_config([Path("a.yml")], {"optimizer": optimizer})
    assert config.origin("optimizer.params.betas") == "default"
    assert config.origin("lr") == "--set"
    assert config.optimizer_params == {"lr": 0.1, "momentum": 0.0, "nesterov": False}


def test_a_path_through_a_value_is_refused(run_folder: Path) -> None:
    write(run_folder / "a.yml", "seed: 1")
    with pytest.raises(ConfigError, match=r"--set: seed.x cannot be set: seed is 1, not a block"):
        load_config([Path("a.yml")], {"seed.x": Override(1, "--set")})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train_iters=100", ("train_iters", 100)),
        ("train-iters=1_000", ("train_iters", 1000)),
        ("optimizer.params.lr=6e-4", ("optimizer.params.lr", 6e-4)),
        ("optimizer.params.betas=[0.9, 0.95]", ("optimizer.params.betas", [0.9, 0.95])),
        ("zero_optimization={stage: 1}", ("zero_optimization", {"stage": 1})),
        ("wandb_group=", ("wandb_group", None)),
        ('wandb_group="2024"', ("wandb_group", "2024")),
        ("use_wandb=True", ("use_wandb", True)),
        ("split=969, 30, 1", ("split", "969, 30, 1")),
        ("load=/data/a=b", ("load", "/data/a=b")),
        ("prompt_end=@@", ("prompt_end", "@@")),
        ("prompt_end=%", ("prompt_end", "%")),
        (" seed = 5", ("seed", 5)),
    ],
)
def test_parse_set(text: str, expected: tuple[str, Any]) -> None:
    assert parse_set(text) == expected


@pytest.mark.parametrize("text", ["seed", "=5", "optimizer..lr=1", ".=1"])
def test_parse_set_explains_itself(text: str) -> None:
    with pytest.raises(ConfigError, match=r"write --set key=value"):
        parse_set(text)


def test_parse_set_of_a_broken_list() -> None:
    with pytest.raises(ConfigError, match=r"--set betas=\[0.9: not valid YAML: did not find"):
        parse_set("betas=[0.9")


# ---- what follows from what


@pytest.mark.parametrize(
    ("given", "world_size", "expected"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, 2, (8, 4, 1)),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, 2, (24, 4, 3)),
        ({"train_batch_size": 24}, 2, (24, 12, 1)),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4}, 2, (24, 4, 3)),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 3}, 2, (24, 4, 3)),
        ({"train_batch_size": 24, "model_parallel_size": 2}, 4, (24, 12, 1)),
    ],
)
def test_batch_sizes(
    given: dict[str, int], world_size: int, expected: tuple[int, int, int]
) -> None:
    needed = {
        "train_iters": 1,
        "data_path": "d",
        "tokenizer_type": "CharLevelTokenizer",
        "optimizer": {"params": {"lr": 1e-3}},
    }
    config = from_dict(MODEL | needed | given, world_size=world_size, purpose="train")
    sizes = (
        config.train_batch_size,
        config.train_micro_batch_size_per_gpu,
        config.gradient_accumulation_steps,
    )
    assert sizes == expected
    assert config.dp * config.tp * config.pp == config.world_size == world_size


def test_batch_sizes_bend_when_nothing_is_trained() -> None:
    """A 20B that was trained on 96 processes generates on 8."""
    sizes = {"train_batch_size": 1536, "train_micro_batch_size_per_gpu": 4}
    config = from_dict(MODEL | sizes | {"gradient_accumulation_steps": 32}, world_size=1)
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (128, 4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 1),
        ({"model_parallel_size": 2, "pipe_parallel_size": 2}, 4),
        ({"num_gpus": 8}, 8),
        ({"num_gpus": 8, "num_nodes": 2}, 16),
        ({"num_gpus": 8, "num_nodes": -1}, 8),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4}, 16),
    ],
)
def test_world_size_when_nobody_counted(
    given: dict[str, int], expected: int, run_folder: Path
) -> None:
    (run_folder / "a.yml").write_text(json.dumps(MODEL | given))
    assert load_config([Path("a.yml")]).world_size == expected


def test_world_size_from_a_function(run_folder: Path) -> None:
    (run_folder / "a.yml").write_text(json.dumps(MODEL | {"model_parallel_size": 2, "num_gpu": 2}))
    seen: list[int] = []

    def count(config: NeoXConfig) -> int:
        seen.append(config.tp)
        raise ConfigError("no such host: worker-9")

    with pytest.raises(ConfigError) as caught:
        load_config([Path("a.yml")], world_size=count)
    assert seen == [2]
    assert str(caught.value).splitlines()[1:] == [
        "  a.yml:1: num_gpu is not a key. Use num_gpus.",
        "  no such host: worker-9",
    ]


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({}, "float32"),
        ({"precision": "fp32"}, "float32"),
        ({"precision": "BFloat16"}, "bfloat16"),
        ({"precision": "fp16"}, "float16"),
        ({"fp16": {"enabled": True, "fp16": True}}, "float16"),
        ({"fp16": {"enabled": False}}, "float32"),
        ({"fp16": {"enabled": True, "type": "bfloat16"}}, "bfloat16"),
        ({"bf16": {"enabled": True}}, "bfloat16"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, "bfloat16"),
        ({"bf16": {"enabled": True}, "precision": "bfloat16"}, "bfloat16"),
        ({"fp16": {"enabled": True, "type": "bfloat16"}, "precision": "bfloat16"}, "bfloat16"),
    ],
)
def test_precision(given: dict[str, Any], dtype: str) -> None:
    assert from_dict(MODEL | given).dtype == dtype


def test_a_precision_on_the_command_line_wins_over_the_files_blocks(run_folder: Path) -> None:
    write(run_folder / "half.yml", "fp16: {enabled: true}")
    assert load_config([Path("half.yml")]).dtype == "float16"
    config = load_config([Path("half.yml")], {"precision": Override("fp32", "--set")})
    assert config.dtype == "float32"
    assert not {"fp16", "bf16"} & to_deepspeed(config).keys()


@pytest.mark.parametrize(
    ("given", "width"),
    [
        ({}, 512),
        ({"intermediate_size": 300}, 300),
        ({"expansion_factor": 2.5}, 320),
        ({"activation": "swiglu"}, 171),  # int(512 * 2 / 3) = 341, packed as two of 171
        ({"activation": "swiglu", "mlp_multiple_of": 64}, 192),
        ({"activation": "swiglu", "intermediate_size": 32768, "mlp_multiple_of": 256}, 11008),
    ],
)
def test_inner_width_of_the_mlp(given: dict[str, Any], width: int) -> None:
    assert ModelConfig(**MODEL, **given).ffn_size == width


def test_properties_of_a_model_alone() -> None:
    model = ModelConfig(**MODEL, rotary_pct=0.25, bias_gelu_fusion=True, num_kv_heads=2)
    assert (model.head_dim, model.rotary_dim, model.kv_heads) == (16, 4, 2)
    assert model.gelu_approximation == "tanh"
    assert model.dtype == "float32"
    assert not model.is_gated
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.num_layers = 5  # type: ignore[misc]


def test_stages_of_a_pipeline() -> None:
    assert from_dict(MODEL | {"pipe_parallel_size": 0}).pp == 1
    assert from_dict(MODEL | {"pipe_parallel_size": 1}).pp == 1
    assert from_dict(MODEL | {"pipe_parallel_size": 4}, world_size=8).dp == 2


# ---- prompts


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("", {}, ("unconditional", "default")),
        ("sample_input_file: a.txt", {}, ("input-file", "derived")),
        ("text_gen_type: interactive\nsample_input_file: a", {}, ("interactive", "a.yml:1")),
        ("text_gen_type: unconditional", {"sample_input_file": ("a", "-i")}, ("input-file", "-i")),
        (
            "",
            {"sample_input_file": ("a", "-i"), "text_gen_type": ("interactive", "--set")},
            ("interactive", "--set"),
        ),
    ],
)
def test_where_prompts_come_from(
    text: str,
    overrides: dict[str, tuple[str, str]],
    expected: tuple[str, str],
    run_folder: Path,
) -> None:
    write(run_folder / "a.yml", text)
    given = {key: Override(*pair) for key, pair in overrides.items()}
    config = load_config([Path("a.yml")], given)
    assert (config.text_gen_type, config.origin("text_gen_type")) == expected


# ---- DeepSpeed's extra arguments


def test_extra_arguments_are_the_keys_themselves(run_folder: Path) -> None:
    write(
        run_folder / "a.yml",
        "deepspeed_extra_args:\n  comms_logger: {enabled: true}\n  disable_allgather: true",
    )
    config = load_config([Path("a.yml")])
    assert config.comms_logger == {"enabled": True}
    assert config.origin("comms_logger.enabled") == "a.yml:2"
    assert config.deepspeed_extra_args == {"disable_allgather": True}


# ---- warnings


def test_each_key_that_does_nothing_gets_one_warning(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(
        run_folder / "a.yml",
        "clip_grad: 0.5\nrope_fusion: false\nuse_comet: false\nrank: 3\n"
        "optimizer: {type: Adam, params: {lr: 1e-3, torch_adam: true}}\nelasticity: "
        "{enabled: false}\nzero_optimization: {stage: 1, cpu_offload: false}",
    )
    load_config([Path("a.yml")])
    assert capsys.readouterr().err.splitlines() == [
        "warning: a.yml:1: clip_grad is 0.5, which does nothing: gradient_clipping is the key "
        "that acts (also upstream).",
        "warning: a.yml:4: rank is 3, which is not read: the launcher tells each process.",
        "warning: a.yml:5: optimizer.params.torch_adam is true, which does nothing: torch's is "
        "always used.",
    ]


BLEND = {f"{split}_data_paths": ["a"] for split in ("train", "valid", "test")}


@pytest.mark.parametrize(
    ("given", "warning"),
    [
        ({"gpt_j_tied": True}, "gpt_j_tied is true, which does nothing: only gpt_j_residual: true"),
        ({"rotary_pct": 0.25}, "rotary_pct is 0.25, which does nothing: only pos_emb: rotary"),
        ({"rotary_interleaved": True}, "which does nothing: only pos_emb: rotary reads it"),
        ({"use_bias_in_final_linear": True}, "does nothing: only no_weight_tying: true reads it"),
        ({"use_bias_in_final_linear": True, "no_weight_tying": True}, ""),
        ({"lr_decay_fraction": 0.5, "lr_decay_iters": 9}, "lr_decay_fraction is 0.5, which does"),
        ({"gpt_j_tied": True, "gpt_j_residual": True}, ""),
        ({"rotary_pct": 0.25, "pos_emb": "rotary"}, ""),
        ({"lr_decay_fraction": 0.5}, ""),
        ({"weight_by_num_documents": True}, "does nothing: only train_data_paths and the like"),
        ({"weighted_sampler_alpha": 0.5}, "does nothing: only weight_by_num_documents: true"),
        (
            BLEND | {"weight_by_num_documents": True, "train_data_weights": [2.0]},
            "train_data_weights is [2.0], which does nothing: weight_by_num_documents sets",
        ),
        (BLEND | {"weight_by_num_documents": True, "weighted_sampler_alpha": 0.5}, ""),
        ({"allow_chopped": False}, "which does nothing: pack_impl: packed always cuts"),
        ({"allow_chopped": False, "pack_impl": "unpacked"}, ""),
        ({"eval_own_documents": True}, "which does nothing: only the files of eval_data_dir are"),
        ({"include_path": "own"}, "which does nothing: only eval_tasks names its tasks"),
        ({"chat_template_path": "a"}, "only apply_chat_template: true and finetune_data read it"),
        ({"eval_own_documents": True, "eval_data_dir": "demo"}, ""),
        ({"include_path": "own", "eval_tasks": ["mine"]}, ""),
        ({"chat_template_path": "a", "apply_chat_template": True}, ""),
    ],
)
def test_keys_that_do_nothing_beside_others(
    given: dict[str, Any], warning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from_dict(MODEL | given)
    printed = capsys.readouterr().err
    assert warning in printed
    assert bool(printed) == bool(warning)


# ---- purposes and files


def test_files_are_looked_for_by_the_purpose_that_needs_them(tmp_path: Path) -> None:
    write(tmp_path / "a.yml", "sample_input_file: prompts.txt\ntext_gen_type: input-file")
    load_config([tmp_path / "a.yml"])
    config = load_config([tmp_path / "a.yml"], purpose="train", check_files=False)

    def missing(purpose: str) -> set[str]:
        return {problem.key for problem in check_files(config, purpose)}

    assert missing("train") == {"data_path", "vocab_file", "merge_file"}
    assert missing("generate") == {"vocab_file", "merge_file", "load", "sample_input_file"}
    assert missing("evaluate") == {"vocab_file", "merge_file", "load"}


def test_what_tasks_read_is_looked_for_by_whoever_evaluates_them(run_folder: Path) -> None:
    keys = ("eval_data_dir", "include_path", "chat_template_path")
    write(run_folder / "a.yml", "\n".join(f"{key}: {key}" for key in keys))

    def missing(purpose: str, **values: Any) -> list[str]:
        overrides = {key: Override(value, "--set") for key, value in values.items()}
        config = load_config([Path("a.yml")], overrides)
        return [p.message for p in check_files(config, purpose) if p.key in keys]

    asked = {"eval_tasks": ["mine"], "apply_chat_template": True}
    assert missing("train", apply_chat_template=True) == []
    assert len(missing("evaluate")) == 2
    for purpose in ("train", "evaluate"):
        assert missing(purpose, **asked) == [
            f'{key} is "{key}", but there is no such folder.' for key in keys
        ]
    for key in keys:
        (run_folder / key).mkdir()
    assert missing("evaluate", **asked) == missing("train", **asked) == []
    (run_folder / "include_path").rmdir()
    (run_folder / "include_path").touch()
    assert missing("evaluate", **asked) == [
        'include_path is "include_path", but that is a file. Name a folder.'
    ]


def test_training_may_start_without_a_checkpoint(run_folder: Path) -> None:
    write(run_folder / "a.yml", "load: fresh")
    load_config([Path("a.yml")], purpose="train")
    with pytest.raises(ConfigError, match="there is no such folder"):
        load_config([Path("a.yml")], {"finetune": Override(True, "--set")}, purpose="train")


def test_a_checkpoint_without_latest_wants_an_iteration(run_folder: Path) -> None:
    write(run_folder / "a.yml", "")
    (run_folder / "checkpoints" / "latest").unlink()
    with pytest.raises(ConfigError, match=r"It holds global_step50 and global_step100. Choose one"):
        load_config([Path("a.yml")], purpose="generate")
    load_config([Path("a.yml")], {"iteration": Override(50, "--iteration")}, purpose="generate")


# ---- transport


def test_round_trip(run_folder: Path) -> None:
    write(
        run_folder / "a.yml",
        "optimizer: {type: Adam, params: {lr: 0.97e-4, eps: 1e-8, betas: [0.9, 0.95]}}\n"
        'attention_config: [[["global"], 24]]\nprompt_end: "\\n\\u00e4"\nseed: 4294967295\n'
        "wandb_group: Gr\u00fc\u00dfe\nlimit: 0.5",
    )
    config = load_config([Path("a.yml")], {"fp16.enabled": Override(True, "--set")})
    copy = NeoXConfig.decode(config.encode())
    assert copy == config
    assert copy.origins == config.origins
    assert copy.config_files == config.config_files
    assert copy.encode() == config.encode()
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(copy, field.name)
        assert type(ours) is type(theirs), field.name


def test_describe(run_folder: Path) -> None:
    write(run_folder / "a.yml", "seed: 7")
    overrides = {"optimizer.params.lr": Override(0.5, "--set")}
    lines = load_config([Path("a.yml")], overrides).describe().splitlines()
    rows = [tuple(line.split("  ", 1)) for line in lines]
    names = [name for name, _ in rows]
    assert {"seed", "num_layers", "lr", "sample_output_file"} <= set(names)
    assert len(names) == len(set(names))
    (seed,) = [line for line in lines if line.startswith("seed ")]
    assert seed.split() == ["seed", "7", "a.yml:1"]
    optimizer = [line.split() for line in lines if line.startswith("optimizer.")]
    assert ["optimizer.type", '"Adam"', "a.yml:8"] in optimizer
    assert ["optimizer.params.lr", "0.5", "--set"] in optimizer
    origins = [line.split()[-1] for line in lines]
    assert origins.index("derived") > origins.index("a.yml:1")
    assert set(origins[origins.index("default") :]) == {"default"}


def test_importing_the_configuration_loads_nothing_heavy() -> None:
    code = "import neox.config, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "deepspeed", "megatron", "pydantic"} & set(loaded.stdout.split())
