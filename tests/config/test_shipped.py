"""Every configuration in configs/ loads, for what it is for, without a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox.config import Override, load_config
from neox.model.gpt import count_parameters
from neox.model.layout import pad_vocab_size

CONFIGS = Path(__file__).parents[2] / "configs"
PARTS = {"local_setup.yml", "text_generation.yml"}  # these go with a model
WHOLE = {"20B.yml", "gpt-j-6B.yml", "demo.yml"}  # these name data and folders themselves
FINETUNE = {"finetune/20B-8bit-lora.yml", "finetune/gpt-j-6B-8bit-lora.yml"}  # all but the texts
NAMES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.yml")
    if path.parent.name != "clusters"  # tests/plan/test_cluster.py
)
WORLDS = {"20B.yml": 96, "gpt-j-6B.yml": 256}  # the processes it was trained on

# Facts of the models: layers, width, heads, samples of a step on one copy of the model.
SHAPES = {
    "19M.yml": (6, 512, 8, 4),
    "49M.yml": (10, 640, 10, 32),
    "125M.yml": (12, 768, 12, 4),
    "350M.yml": (24, 1024, 16, 4),
    "760M.yml": (24, 1536, 16, 4),
    "800M.yml": (16, 2048, 8, 16),
    "1-3B.yml": (24, 2048, 16, 4),
    "2-7B.yml": (32, 2560, 32, 4),
    "6-7B.yml": (32, 4096, 32, 4),
    "13B.yml": (40, 5120, 40, 4),
    "20B.yml": (44, 6144, 64, 128),
    "gpt-j-6B.yml": (28, 4096, 16, 16),
    "175B.yml": (96, 12288, 96, 4),
    "finetune/20B-8bit-lora.yml": (44, 6144, 64, 8),
    "finetune/gpt-j-6B-8bit-lora.yml": (28, 4096, 16, 8),
    "pythia/14M.yml": (6, 128, 4, 32),
    "pythia/31M.yml": (6, 256, 8, 32),
    "pythia/70M.yml": (6, 512, 8, 32),
    "pythia/160M.yml": (12, 768, 12, 32),
    "pythia/410M.yml": (24, 1024, 16, 32),
    "pythia/1B.yml": (16, 2048, 8, 16),
    "pythia/1-4B.yml": (24, 2048, 16, 16),
    "pythia/2-8B.yml": (32, 2560, 32, 16),
    "pythia/6-9B.yml": (32, 4096, 32, 16),
    "pythia/12B.yml": (36, 5120, 40, 16),
}


def files(name: str) -> list[Path]:
    if name in WHOLE | FINETUNE:
        return [Path(name)]
    model = "125M.yml" if name in PARTS else name
    return [Path(part) for part in dict.fromkeys([model, "local_setup.yml", name])]


@pytest.mark.parametrize("purpose", ["train", "generate", "evaluate"])
@pytest.mark.parametrize("name", NAMES)
def test_it_loads(name: str, purpose: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(
        files(name),
        {"finetune_data": Override("texts", "--set")} if name in FINETUNE else {},
        conf_dir=CONFIGS,
        purpose=purpose,
        world_size=WORLDS.get(name),
        check_files=False,
    )
    warnings = capsys.readouterr().err.splitlines()
    if name != "20B.yml":  # the original keeps its keys for kernels that are not here
        assert warnings == []
    if name in SHAPES:
        layers, width, heads, samples = SHAPES[name]
        assert (config.num_layers, config.hidden_size) == (layers, width)
        assert config.num_attention_heads == heads
        assert config.train_batch_size == samples * config.dp


def test_every_model_is_in_the_table() -> None:
    assert set(NAMES) == set(SHAPES) | PARTS | WHOLE


def test_the_20b_takes_1536_samples_a_step() -> None:
    config = load_config([CONFIGS / "20B.yml"], purpose="train", world_size=96, check_files=False)
    assert (config.dp, config.train_batch_size) == (12, 1536)
    assert (config.head_dim, config.rotary_dim, config.gelu_approximation) == (96, 24, "tanh")


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_gpt_j_has_its_rows_and_parameters_at_any_tp(tp: int) -> None:
    config = load_config(
        [CONFIGS / "gpt-j-6B.yml"],
        {"model_parallel_size": Override(tp, "--set")},
        purpose="train",
        world_size=32 * tp,
        check_files=False,
    )
    assert (config.train_batch_size, config.rotary_dim, config.ffn_size) == (512, 64, 16384)
    rows = pad_vocab_size(50257, config.make_vocab_size_divisible_by, tp)
    assert (rows, count_parameters(config, rows)) == (50400, 6_050_882_784)


def test_generation_as_the_manual_has_it() -> None:
    names = [Path("125M"), Path("local_setup"), Path("text_generation")]
    config = load_config(names, conf_dir=CONFIGS, purpose="generate", check_files=False)
    assert (config.maximum_tokens, config.num_samples, config.temperature) == (102, 10, 1.0)
    assert config.prompt_end == "\n"
