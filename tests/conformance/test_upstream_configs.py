"""Upstream's keys, and upstream's own configuration files: each loads, or says why it does not."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from neox.config import NeoXConfig, load_config
from neox.config.fields import keys_of
from neox.config.values import describe_type
from neox.errors import ConfigError
from tests.config.test_keys import OURS
from tests.conformance.conftest import SHARED

CONFIGS = SHARED / "upstream" / "configs"
NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yml"))

# ---- keys

# Ours differ where a value is settled after loading, and always there.
OTHER_DEFAULTS = {
    "git_hash": None,
    "lr": 0.001,
    "text_gen_type": "unconditional",
    "world_size": 1,
    "zero_stage": 0,
}
# Upstream's annotation is wrong, looser, or of use to other tools only.
OTHER_TYPES = {
    "comet_tags",  # list | None there, as everywhere here
    "communication_data_type",  # bool there, so that no type could be given
    "distributed_backend",  # any text there
    "launcher",  # the two launchers of its manual that it rejects are taken here
    "output_layer_parallelism",  # "row" gets a reason here
    "text_gen_type",  # any text there
    "zero_stage",  # lists and "all" are for the autotuner
}


def upstream_keys(shared: Path) -> dict[str, dict[str, Any]]:
    return json.loads((shared / "upstream" / "keys.json").read_text())


def test_every_key_is_known(shared: Path) -> None:
    known = set(keys_of(NeoXConfig))
    theirs = set(upstream_keys(shared))
    assert len(theirs) == 318
    assert theirs <= known
    assert known - theirs == OURS


def test_defaults_are_upstreams(shared: Path) -> None:
    for name, theirs in upstream_keys(shared).items():
        spec = keys_of(NeoXConfig)[name]
        ours = None if spec.required else spec.default
        assert ours == OTHER_DEFAULTS.get(name, theirs["default"]), name
        assert type(ours) is type(OTHER_DEFAULTS.get(name, theirs["default"])), name


def test_types_are_upstreams(shared: Path) -> None:
    words = {
        "<class 'int'>": "an integer",
        "<class 'float'>": "a number",
        "<class 'str'>": "text",
        "<class 'bool'>": "true or false",
        "<class 'dict'>": "a block of keys",
        "<class 'list'>": "a list of",
        "typing.Optional[str]": "text",
        "typing.Optional[list]": "a list of",
        "typing.Optional[dict]": "a block of keys",
        "typing.Any": "anything",
        "typing.Union[int, float]": "a number",
        "typing.Union[int, typing.List[int]]": "an integer or a list of integers",
        "typing.Union[str, typing.List[str]]": "text or a list of texts",
    }
    for name, theirs in upstream_keys(shared).items():
        ours = describe_type(keys_of(NeoXConfig)[name].type)
        if name in OTHER_TYPES:
            continue
        if theirs["type"].startswith("typing.Literal"):
            choices = re.findall(r"'([^']+)'", theirs["type"])
            assert all(choice in ours for choice in choices), name
        else:
            assert ours.startswith(words[theirs["type"]]), name


# ---- files


@dataclass(frozen=True)
class Outcome:
    """`partners` are loaded with a file; `problems` are what is then wrong, without file:line."""

    partners: tuple[str, ...] = ("local_setup.yml",)
    problems: tuple[str, ...] = ()


ALONE = Outcome(partners=())
WITH_A_MODEL = Outcome(partners=("125M.yml",))
# llama's and llama2's files hold a model, train_config.yml the training; no data.
LLAMA = Outcome(partners=("llama/train_config.yml", "local_setup.yml"))
MAMBA = (
    'attention_config holds "mamba", which is not supported',
    "mamba_selective_scan_fusion is true, which is refused: Mamba layers are not supported",
    "mamba_causal_conv_fusion is true, which is refused: Mamba layers are not supported",
    "mamba_inner_func_fusion is true, which is refused: Mamba layers are not supported",
)
# 12 heads, left over from the smallest: of no meaning to Mamba, but wrong for attention.
HEADS = "but it is not divisible by num_attention_heads (12)"

OUTCOMES = {
    "20B.yml": ALONE,
    "125M-dmoe.yml": Outcome(
        problems=("moe_num_experts is 8, which is refused: mixture-of-experts layers are not",)
    ),
    "cpu_mock_config.yml": Outcome(partners=("125M.yml", "local_setup.yml")),
    # Not with a Pythia: both name the tokenizer, one of them with a hyphen.
    "docker/pythia-paths.yml": WITH_A_MODEL,
    "eleutherai_cluster.yml": WITH_A_MODEL,
    "finetuning_configs/6-9B.yml": Outcome(partners=("slurm_local.yml",)),
    "gmlp_small.yml": Outcome(
        problems=(
            'attention_config holds "gmlp", which is not supported',
            'optimizer.params.eps is "1.0e_8", but it must be a number. Did you mean 1.0e-8?',
        )
    ),
    "llama/7B.yml": LLAMA,
    "llama/13B.yml": LLAMA,
    "llama/30B.yml": LLAMA,
    "llama/65B.yml": LLAMA,
    "llama/train_config.yml": Outcome(partners=("llama/7B.yml", "local_setup.yml")),
    "llama2/7B.yml": LLAMA,
    "llama2/13B.yml": LLAMA,
    "llama2/70B.yml": LLAMA,
    "llama2/codellama_7B.yml": LLAMA,
    "llama2/codellama_34B.yml": LLAMA,
    "llemma/7B.yml": Outcome(
        partners=(),
        problems=(
            "decay_lr_to is not a key. Use min_lr",
            "warmup_iters is not a key. Use warmup",
            "data_path is missing",
        ),
    ),
    "llemma/34B.yml": Outcome(problems=("attention_type is not a key. Use num_kv_heads",)),
    "local_setup.yml": WITH_A_MODEL,
    "local_setup_comet.yml": WITH_A_MODEL,
    "local_setup_wandb.yml": WITH_A_MODEL,
    "mamba/mamba-130M.yml": Outcome(problems=MAMBA),
    "mamba/mamba-370M.yml": Outcome(problems=(HEADS, *MAMBA)),
    "mamba/mamba-790M.yml": Outcome(problems=MAMBA),
    "mamba/mamba-1.4B.yml": Outcome(problems=(HEADS, *MAMBA)),
    "mamba/mamba-2.8B.yml": Outcome(problems=(HEADS, *MAMBA)),
    "mistral/7B.yml": LLAMA,
    "prof.yml": Outcome(partners=("125M.yml", "docker/pythia-paths.yml")),
    "pythia/14M.yml": ALONE,
    "pythia/31M.yml": ALONE,
    "rwkv/170M.yml": Outcome(problems=('attention_config holds "rwkv", which is not supported',)),
    "slurm_local.yml": WITH_A_MODEL,
    "sparse.yml": Outcome(
        partners=("125M.yml", "local_setup.yml"),
        problems=(
            'attention_config holds "local", which is not supported',
            'sparsity_config is {"block": 16, "num_local_blocks": 32}, which is refused: sparse',
        ),
    ),
    "text_generation.yml": Outcome(partners=("125M.yml", "local_setup.yml")),
}


def test_there_are_59_of_them() -> None:
    assert len(NAMES) == 59
    assert set(OUTCOMES) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = OUTCOMES.get(name, Outcome())
    files = [CONFIGS / file for file in (name, *outcome.partners)]
    if not outcome.problems:
        config = load_config(files, purpose="train", check_files=False)
        assert_values_arrived(config, files[0])
        assert len(capsys.readouterr().err.splitlines()) <= 8
        return
    with pytest.raises(ConfigError) as caught:
        load_config(files, purpose="train", check_files=False)
    lines = str(caught.value).splitlines()
    lines = lines[1:] if len(lines) > 1 else lines
    assert len(lines) == len(outcome.problems), lines
    for line, problem in zip(lines, outcome.problems, strict=True):
        assert problem in line
        located = re.match(rf"\s*{re.escape(os.path.basename(name))}:\d+: ", line)
        assert located or "is missing" in line


def assert_values_arrived(config: NeoXConfig, file: Path) -> None:
    """What the file says is what the configuration holds, wherever a key acts or is ignored."""
    keys = keys_of(NeoXConfig)
    for name, value in yaml.safe_load(file.read_text()).items():
        name = name.replace("-", "_")
        if keys[name].status in ("acts", "ignored") and name != "deepspeed_extra_args":
            assert getattr(config, name) == value, name
            assert config.origin(name).startswith(f"{file.name}:"), name
