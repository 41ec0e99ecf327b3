"""What a transformers folder brings to a configuration, and the config.json that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neox.config import NeoXConfig, Override, from_dict, load_config
from neox.config.hf import is_transformers, read_folder, yaml_text
from neox.config.hf_classes import config_json, model_type
from neox.errors import ConfigError

# config.json as transformers 4.17 to 4.56 and as 5 wrote it, without what no version reads.
OLD: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 256,
    "layer_norm_eps": 1e-6,
    "max_position_embeddings": 32,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "rotary_emb_base": 5000,
    "rotary_pct": 0.5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_parallel_residual": True,
    "vocab_size": 96,
}
NEW = {key: OLD[key] for key in OLD if key not in ("rotary_pct", "rotary_emb_base", "torch_dtype")}
NEW |= {
    "dtype": "float16",
    "attention_bias": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5000.0,
        "partial_rotary_factor": 0.5,
    },
}
EXPECTED = {
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 256,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "pos_emb": "rotary",
    "rotary_pct": 0.5,
    "rotary_emb_base": 5000,
    "norm": "layernorm",
    "layernorm_epsilon": 1e-6,
    "activation": "gelu",
    "bias_gelu_fusion": False,
    "gpt_j_residual": True,
    "use_bias_in_attn_linear": True,
    "use_bias_in_mlp": True,
    "no_weight_tying": True,
    "precision": "fp16",
}
MODEL = {
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "seq_length": 32,
    "max_position_embeddings": 32,
}


def write(folder: Path, config: Any, weights: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    (folder / weights).touch()
    return folder


def load(folder: Path, **values: Any) -> NeoXConfig:
    return from_dict({"load": str(folder), **values})


def problems(folder: Path, **values: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load(folder, **values)
    return str(error.value)


@pytest.mark.parametrize("text", [OLD, NEW], ids=["version 4", "version 5"])
def test_every_era_brings_the_architecture(text: dict[str, Any], tmp_path: Path) -> None:
    config = load(write(tmp_path, text))
    assert {key: getattr(config, key) for key in EXPECTED} == EXPECTED
    assert {config.origin(key) for key in EXPECTED} == {"config.json"}


def test_what_config_json_leaves_out_is_transformers_default(tmp_path: Path) -> None:
    config = load(write(tmp_path, {"model_type": "gpt_neox", "rope_scaling": None}))
    assert (config.num_layers, config.hidden_size, config.ffn_size) == (44, 6144, 24576)
    assert (config.rotary_pct, config.rotary_emb_base) == (0.25, 10000)
    assert config.gpt_j_residual and config.no_weight_tying and config.use_bias_in_attn_linear


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"hidden_act": "gelu_fast"}, {"activation": "gelu", "bias_gelu_fusion": True}),
        ({"hidden_act": "gelu_new"}, {"activation": "gelu", "bias_gelu_fusion": True}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu", "bias_gelu_fusion": True}),
        ({"hidden_act": "relu"}, {"activation": "relu"}),
        ({"use_parallel_residual": False}, {"gpt_j_residual": False}),
        ({"tie_word_embeddings": True}, {"no_weight_tying": False}),
        ({"attention_bias": False}, {"use_bias_in_attn_linear": False, "use_bias_in_mlp": True}),
        ({"intermediate_size": 100}, {"ffn_size": 100}),
        ({"torch_dtype": "bfloat16"}, {"precision": "bfloat16"}),
        ({"torch_dtype": None}, {"precision": "fp32"}),
    ],
    ids=str,
)
def test_translation(theirs: dict[str, Any], ours: dict[str, Any], tmp_path: Path) -> None:
    config = load(write(tmp_path, OLD | theirs))
    assert {key: getattr(config, key) for key in ours} == ours


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"model_type": "llama"}, 'model_type is "llama", which does not load'),
        ({"architectures": ["GPTNeoXForSequenceClassification"]}, "only GPTNeoXForCausalLM"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'are scaled ("linear")'),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, 'are scaled ("yarn")'),
        ({"hidden_act": "quick_gelu"}, 'hidden_act is "quick_gelu", which is not supported'),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"num_hidden_layers": "3"}, 'num_hidden_layers is "3", but it must be an integer'),
        ({"hidden_size": 0}, "hidden_size is 0, but it must be 1 or more"),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings is "no", but it must be true'),
        ({"vocab_size": -1}, "vocab_size is -1, but it must be an integer of 1 or more"),
        ({"rotary_emb_base": 0.5}, "rotary_emb_base is 0.5, but it must be an integer"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused_in_one_line(
    theirs: dict[str, Any], said: str, tmp_path: Path
) -> None:
    message = problems(write(tmp_path, OLD | theirs))
    assert said in message and f"{tmp_path}/config.json: " in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "\x00"], ids=lambda t: t[:3])
def test_a_config_json_that_is_none(text: str, tmp_path: Path) -> None:
    message = problems(write(tmp_path, text))
    assert f"{tmp_path}/config.json" in message and "\n" not in message


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ({"num_layers": 4}, "num_layers is 4, but num_hidden_layers is 3"),
        ({"gpt_j_residual": False}, "gpt_j_residual is false, but use_parallel_residual is true"),
        ({"gpt_j_tied": True}, 'gpt_j_tied is true, but model_type is "gpt_neox"'),
        ({"rotary_pct": 0.25}, "rotary_pct is 0.25, but rotary_pct is 0.5"),
        ({"bias_gelu_fusion": True}, 'bias_gelu_fusion is true, but hidden_act is "gelu"'),
        ({"no_weight_tying": False}, "no_weight_tying is false, but tie_word_embeddings is false"),
        ({"num_kv_heads": 2}, "num_kv_heads is 2, but num_attention_heads is 8"),
        ({"sliding_window_width": 4}, "sliding_window_width is 4, but model_type is"),
        ({"norm": "rmsnorm"}, 'norm is "rmsnorm", but model_type is "gpt_neox"'),
        ({"expansion_factor": 3}, "expansion_factor is 3.0, but intermediate_size is 256"),
        ({"mlp_multiple_of": 100}, "mlp_multiple_of is 100, but intermediate_size is 256"),
    ],
    ids=str,
)
def test_a_key_that_contradicts_is_named_with_both_places(
    ours: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "model", OLD)
    file = tmp_path / "mine.yml"
    file.write_text(yaml_text({"load": str(folder), **ours}))
    with pytest.raises(ConfigError) as error:
        load_config([file])
    assert f"mine.yml:2: {said}" in str(error.value)
    assert f" in {folder}/config.json" in str(error.value)


def test_every_contradiction_is_told(tmp_path: Path) -> None:
    message = problems(write(tmp_path, OLD), num_layers=4, gpt_j_residual=False)
    assert message.startswith("2 problems")


def test_keys_that_say_the_same_are_kept(tmp_path: Path) -> None:
    config = load(
        write(tmp_path, OLD),
        expansion_factor=4,
        num_kv_heads=8,
        rotary_pct=0.5,
        seq_length=16,
        max_position_embeddings=64,
        precision="fp32",
        tokenizer_type="CharLevelTokenizer",
    )
    assert (config.ffn_size, config.intermediate_size) == (256, None)
    assert (config.seq_length, config.max_position_embeddings) == (16, 64)
    assert (config.precision, config.tokenizer_type) == ("fp32", "CharLevelTokenizer")
    assert config.origin("num_layers") == "config.json"


def test_a_folder_brings_its_tokenizer_unless_one_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, OLD)
    assert load(folder).tokenizer_type == "GPT2BPETokenizer"
    (folder / "tokenizer.json").write_text("{}")
    config = load(folder)
    assert (config.tokenizer_type, config.vocab_file) == ("HFTokenizer", f"{folder}/tokenizer.json")
    assert config.origin("vocab_file") == "tokenizer.json"
    assert load(folder, vocab_file="mine.json").tokenizer_type == "GPT2BPETokenizer"


def test_a_folder_with_the_files_of_gpt_2_has_its_tokenizer(tmp_path: Path) -> None:
    folder = write(tmp_path, OLD)
    (folder / "vocab.json").write_text("{}")
    assert load(folder).vocab_file is None
    (folder / "merges.txt").write_text("")
    config = load(folder)
    assert (config.tokenizer_type, config.vocab_file, config.merge_file) == (
        ("GPT2BPETokenizer", f"{folder}/vocab.json", f"{folder}/merges.txt")
    )
    assert "merges.txt" in config.config_files["transformers.yml"]
    assert load(folder, tokenizer_type="CharLevelTokenizer").vocab_file is None
    (folder / "tokenizer.json").write_text("{}")
    assert load(folder).tokenizer_type == "HFTokenizer"


GPT_J: dict[str, Any] = {  # as the hub has it, of 4.18
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "torch_dtype": "float16",
    "vocab_size": 50400,
}
IS_GPT_J = {
    "num_layers": 28,
    "hidden_size": 4096,
    "num_attention_heads": 16,
    "ffn_size": 16384,
    "seq_length": 2048,
    "max_position_embeddings": 2048,
    "pos_emb": "rotary",
    "rotary_dim": 64,
    "rotary_emb_base": 10000,
    "rotary_interleaved": True,
    "norm": "layernorm",
    "layernorm_epsilon": 1e-5,
    "activation": "gelu",
    "bias_gelu_fusion": True,
    "gpt_j_residual": True,
    "gpt_j_tied": True,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": True,
    "no_weight_tying": True,
    "use_bias_in_final_linear": True,
}


@pytest.mark.parametrize(
    "text",
    [
        GPT_J,
        {**GPT_J, "dtype": "float16", "torch_dtype": None},
        {"model_type": "gptj", "torch_dtype": "float16"},
        {"model_type": "gptj", "dtype": "float16", "hidden_size": 4096, "num_hidden_layers": 28},
    ],
    ids=["version 4", "version 5", "defaults", "general names"],
)
def test_gpt_j_by_its_config_json(text: dict[str, Any], tmp_path: Path) -> None:
    config = load(write(tmp_path, text))
    assert {key: getattr(config, key) for key in IS_GPT_J} == IS_GPT_J
    assert config.precision == "fp16"


def test_the_shipped_gpt_j_is_the_folders(tmp_path: Path) -> None:
    folder = write(tmp_path, GPT_J)
    shipped = Path(__file__).parents[2] / "configs/gpt-j-6B.yml"
    load_config([shipped], {"load": Override(str(folder), "--load")}, check_files=False)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"n_inner": 100}, {"ffn_size": 100}),
        ({"rotary_dim": 256}, {"rotary_pct": 1.0}),
        ({"n_embd": 784, "n_head": 16, "rotary_dim": 2}, {"rotary_dim": 2}),  # 2 / 49 x 49 < 2
        ({"activation_function": "relu"}, {"activation": "relu"}),
        ({"tie_word_embeddings": True}, {"no_weight_tying": True}),
        ({"layer_norm_epsilon": 1e-6}, {"layernorm_epsilon": 1e-6}),
    ],
    ids=str,
)
def test_translation_of_gpt_j(theirs: dict[str, Any], ours: dict[str, Any], tmp_path: Path) -> None:
    config = load(write(tmp_path, GPT_J | theirs))
    assert {key: getattr(config, key) for key in ours} == ours


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"model_type": ["gptj"]}, 'model_type is ["gptj"], which does not load. Only gpt_neox'),
        ({"model_type": None}, "model_type is null, which does not load"),
        ({"architectures": ["GPTJForQuestionAnswering"]}, "but only GPTJForCausalLM loads"),
        ({"rotary_dim": None}, "rotary_dim is null, but it must be an even number up to 256"),
        ({"rotary_dim": 63}, "rotary_dim is 63, but it must be an even number up to 256"),
        ({"rotary_dim": 258}, "rotary_dim is 258, but it must be an even number up to 256"),
        ({"rotary_dim": "64"}, 'rotary_dim is "64", but it must be'),
        ({"n_embd": 4100}, "n_embd is 4100, which n_head (16) does not divide"),
        ({"n_head": 0}, "n_head is 0, but it must be 1 or more"),
        ({"n_embd": "big"}, 'n_embd is "big", but it must be an integer'),
        ({"n_inner": 0}, "n_inner is 0, but it must be 1 or more"),
        ({"activation_function": "quick_gelu"}, 'activation_function is "quick_gelu", which'),
        ({"quantization_config": {}}, "quantized"),
    ],
    ids=str,
)
def test_a_gpt_j_that_cannot_be_computed(theirs: dict[str, Any], said: str, tmp_path: Path) -> None:
    message = problems(write(tmp_path, GPT_J | theirs))
    assert said in message and f"{tmp_path}/config.json: " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5, but rotary_dim is 64"),
        ({"rotary_interleaved": False}, 'rotary_interleaved is false, but model_type is "gptj"'),
        ({"no_weight_tying": False}, 'no_weight_tying is false, but model_type is "gptj"'),
        ({"use_bias_in_final_linear": False}, "is false, but model_type is"),
        ({"num_layers": 4}, "num_layers is 4, but n_layer is 28"),
        ({"intermediate_size": 64}, "intermediate_size is 64, but n_inner is null"),
        ({"bias_gelu_fusion": False}, 'is false, but activation_function is "gelu_new"'),
        ({"rotary_emb_base": 500}, 'rotary_emb_base is 500, but model_type is "gptj"'),
    ],
    ids=str,
)
def test_a_key_that_contradicts_gpt_j(ours: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in problems(write(tmp_path, GPT_J), **ours)


def test_what_was_taken_is_kept_as_a_file_that_stands_for_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", OLD)
    (folder / "tokenizer.json").write_text("{}")
    mine = tmp_path / "mine.yml"
    mine.write_text(yaml_text({"seed": 5, "rotary_pct": 0.5, "load": str(folder)}))
    config = load_config([mine])
    assert config.config_files.keys() == {"mine.yml", "transformers.yml"}
    (tmp_path / "transformers.yml").write_text(config.config_files["transformers.yml"])
    again = load_config(
        [mine, tmp_path / "transformers.yml"], {"load": Override("elsewhere", "--load")}
    )
    assert load_config([mine, tmp_path / "transformers.yml"]).config_files == again.config_files
    keys = (*EXPECTED, "tokenizer_type", "vocab_file", "seed")
    assert [getattr(again, key) for key in keys] == [getattr(config, key) for key in keys]


def test_training_keeps_its_own_precision(tmp_path: Path) -> None:
    folder = write(tmp_path, OLD)
    values = {"load": str(folder), "train_iters": 1, "data_path": "x", "vocab_file": "v"}
    values |= {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}, "merge_file": "m"}
    assert from_dict(values | {"train_micro_batch_size_per_gpu": 1}, purpose="train").dtype == (
        "float32"
    )


@pytest.mark.parametrize("purpose", ["generate", "evaluate"])
def test_a_folder_is_all_that_is_needed(purpose: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", OLD)
    (folder / "tokenizer.json").write_text("{}")
    override = {"load": Override(str(folder), "--load")}
    (tmp_path / "empty.yml").write_text("seed: 1\n")
    assert load_config([tmp_path / "empty.yml"], override, purpose=purpose).num_layers == 3


def test_a_step_folder_is_accepted(tmp_path: Path) -> None:
    step = tmp_path / "global_step5"
    step.mkdir()
    (step / "layer_00-model_00-model_states.pt").touch()
    values = MODEL | {"load": str(step), "tokenizer_type": "CharLevelTokenizer"}
    (tmp_path / "a.yml").write_text(yaml_text(values))
    assert load_config([tmp_path / "a.yml"], purpose="generate").load == str(step)
    (step / "layer_00-model_00-model_states.pt").rename(step / "mp_rank_00_model_states.pt")
    assert load_config([tmp_path / "a.yml"], purpose="generate").load == str(step)


def test_recognition(tmp_path: Path) -> None:
    assert not is_transformers(tmp_path)
    assert not is_transformers(tmp_path / ("x" * 300))
    (tmp_path / "config.json").write_text("{}")
    assert not is_transformers(tmp_path)
    for name in ("model-00001-of-00002.safetensors", "pytorch_model.bin.index.json"):
        (tmp_path / name).touch()
        assert is_transformers(tmp_path)
        (tmp_path / name).unlink()


def test_with_an_iteration_a_folder_is_no_transformers_folder(tmp_path: Path) -> None:
    assert "are missing" in problems(write(tmp_path, OLD), iteration=3)


WRITTEN = {
    "gpt_neox": {"pos_emb": "rotary", "gpt_j_residual": True},
    "gptj": {
        "pos_emb": "rotary",
        "rotary_pct": 0.5,
        "rotary_interleaved": True,
        "gpt_j_residual": True,
        "gpt_j_tied": True,
        "use_bias_in_attn_linear": False,
        "bias_gelu_fusion": True,
    },
    "gpt2": {"pos_emb": "learned"},
    "llama": {"pos_emb": "rotary", "norm": "rmsnorm", "activation": "swiglu"},
    "mistral": {
        "pos_emb": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "sliding_window_width": 7,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
    },
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_the_class_that_is_written(kind: str) -> None:
    config = from_dict(MODEL | WRITTEN[kind])
    tokens = {"bos_token_id": 5, "eos_token_id": 5, "pad_token_id": None}
    written = config_json(config, 96, "bfloat16", tokens)
    assert written["model_type"] == model_type(config) == kind
    assert (written["vocab_size"], written["dtype"], written["torch_dtype"]) == (
        (96, "bfloat16", "bfloat16")
    )
    assert written["eos_token_id"] == 5
    assert written["tie_word_embeddings"] == (kind != "gptj")  # whose bias needs a layer
    assert written.get("sliding_window") == (8 if kind == "mistral" else None)
    # Under the root what was added to it: the square.
    assert written.get("rms_norm_eps") == (1e-8**2 if config.norm == "rmsnorm" else None)


@pytest.mark.parametrize("is_tanh", [False, True])
def test_gpt_neox_is_written_for_both_versions_and_read_back(is_tanh: bool, tmp_path: Path) -> None:
    values = MODEL | {"pos_emb": "rotary", "rotary_pct": 0.5, "rotary_emb_base": 500}
    config = from_dict(values | {"bias_gelu_fusion": is_tanh, "no_weight_tying": True})
    written = config_json(config, 96, "float32", {})
    assert written["hidden_act"] == ("gelu_pytorch_tanh" if is_tanh else "gelu")
    assert (written["rotary_pct"], written["rotary_emb_base"]) == (0.5, 500)
    assert written["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.5,
    }
    folder = read_folder(write(tmp_path, written))
    assert folder.values == {
        key: config.ffn_size if key == "intermediate_size" else getattr(config, key)
        for key in folder.values
    }
    assert (folder.vocab_size, folder.precision) == (96, "fp32")


def test_gptj_is_written_and_read_back(tmp_path: Path) -> None:
    untied = {"no_weight_tying": True, "use_bias_in_final_linear": True}
    config = from_dict(MODEL | WRITTEN["gptj"] | untied)
    written = config_json(config, 96, "float32", {})
    assert (written["rotary_dim"], written["n_inner"]) == (4, 256)
    folder = read_folder(write(tmp_path, written))
    assert folder.values == {
        key: config.ffn_size if key == "intermediate_size" else getattr(config, key)
        for key in folder.values
    }


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"pos_emb": "none"}, "GPTNeoXForCausalLM is nearest to it, but pos_emb is none"),
        ({"pos_emb": "learned", "gpt_j_residual": True}, "GPT2LMHeadModel is nearest"),
        ({"pos_emb": "rotary", "activation": "geglu"}, "activation is geglu"),
        ({"pos_emb": "rotary", "activation": "softsign"}, "activation is softsign"),
        ({"pos_emb": "rotary", "sliding_window_width": 4}, "sliding_window_width is 4"),
        ({**WRITTEN["llama"], "rotary_pct": 0.5}, "rotary_pct is 0.5"),
        ({**WRITTEN["llama"], "gpt_j_residual": True}, "gpt_j_residual is true"),
        ({**WRITTEN["llama"], "activation": "gelu"}, "activation is gelu"),
        ({**WRITTEN["mistral"], "use_bias_in_mlp": True}, "there are biases"),
        ({**WRITTEN["gptj"], "gpt_j_tied": False}, "GPTJForCausalLM is nearest to it, but gpt_j_t"),
        ({**WRITTEN["gptj"], "gpt_j_residual": False}, "gpt_j_residual is false"),
        ({**WRITTEN["gptj"], "use_bias_in_attn_linear": True}, "its attention has no biases"),
        ({**WRITTEN["gptj"], "rotary_emb_base": 500}, "rotary_emb_base is 500 (it has 10000)"),
        ({**WRITTEN["gptj"], "activation": "geglu"}, "activation is geglu"),
        ({**WRITTEN["llama"], "rotary_interleaved": True}, "rotary_interleaved is true"),
        (
            {**WRITTEN["gpt_neox"], "use_bias_in_final_linear": True, "no_weight_tying": True},
            "GPTNeoXForCausalLM is nearest to it, but use_bias_in_final_linear is true",
        ),
    ],
    ids=str,
)
def test_a_model_of_no_class_is_refused_with_the_reason(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match="no class of transformers") as error:
        model_type(from_dict(MODEL | values))
    assert said in str(error.value)
