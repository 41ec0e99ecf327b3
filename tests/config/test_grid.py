"""Generation and evaluation take the grid that the devices allow; training never changes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox.config import Devices, NeoXConfig, Problem, load_config
from neox.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def load(path: Path, devices: Devices | None, purpose: str = "generate") -> NeoXConfig:
    return load_config(
        [path], purpose=purpose, world_size=lambda config: devices, check_files=False
    )


def model(folder: Path, text: str) -> Path:
    """A model of 12 layers and 24 heads; its inner width divides by all that the heads do."""
    path = folder / "a.yml"
    path.write_text(
        f"{text}\n"
        "num_layers: 12\nhidden_size: 96\nnum_attention_heads: 24\nseq_length: 16\n"
        "max_position_embeddings: 16\nload: here\ntokenizer_type: CharLevelTokenizer\n"
        "data_path: d\ntrain_iters: 1\noptimizer: {params: {lr: 0.1}}\n"
    )
    return path


GRID = "model_parallel_size: {}\npipe_parallel_size: {}"


@pytest.mark.parametrize(
    ("devices", "grid", "line"),
    [
        (1, (1, 1, 1), "needs 8 devices and there is 1: using tp 1 x pp 1"),
        (2, (2, 1, 1), "needs 8 devices and there are 2: using tp 2 x pp 1"),
        (3, (2, 1, 1), "needs 8 devices and there are 3: using tp 2 x pp 1, 1 device is not used"),
        (4, (2, 2, 1), "needs 8 devices and there are 4: using tp 2 x pp 2"),
        (
            6,
            (2, 2, 1),
            "needs 8 devices and there are 6: using tp 2 x pp 2, 2 devices are not used",
        ),
        (8, (2, 4, 1), None),
        (11, (2, 4, 1), "takes 8 devices and there are 11: 3 devices are not used"),
        (16, (2, 4, 2), None),
    ],
)
@pytest.mark.parametrize("purpose", ["generate", "evaluate"])
def test_the_20b_on_as_many_devices_as_there_are(
    devices: int,
    grid: tuple[int, int, int],
    line: str | None,
    purpose: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = load(CONFIGS / "20B.yml", Devices((devices,)), purpose)
    assert (config.tp, config.pp, config.dp) == grid
    assert config.world_size == config.tp * config.pp * config.dp
    lines = [text for text in capsys.readouterr().out.splitlines() if text.startswith("grid:")]
    assert lines == ([] if line is None else [f"grid: tp 2 x pp 4 (20B.yml:15) {line}"])


@pytest.mark.parametrize(
    ("given", "devices", "expected"),
    [
        ((1, 4), (3,), (1, 3)),  # the given tp, where it spreads one copy as far
        ((3, 4), (4,), (4, 1)),  # 3 x 1 is one device less; 4 is nearer to 3 than 2 is
        ((2, 4), (3,), (3, 1)),  # every device, though the given tp would go on with two
        ((4, 2), (5,), (4, 1)),  # the model does not divide by 5
        ((8, 1), (6,), (6, 1)),
        ((8, 1), (7,), (6, 1)),
        ((1, 6), (4,), (1, 4)),
        ((24, 1), (12,), (12, 1)),
        ((8, 12), (24,), (8, 3)),
        ((8, 1), (4, 4), (8, 1)),  # as given: it fits
        ((8, 2), (4, 4), (4, 2)),  # a tensor-parallel group stays on one host
        ((8, 2), (6, 6), (6, 2)),
        ((8, 2), (6, 3), (3, 3)),
        ((8, 2), (4, 4, 3), (1, 1)),  # all 11 start, and no copy takes 11
        ((5, 1), (1,), (1, 1)),  # the given grid need not divide the model
    ],
)
def test_one_copy_is_spread_as_far_as_it_goes(
    given: tuple[int, int], devices: tuple[int, ...], expected: tuple[int, int], tmp_path: Path
) -> None:
    there = Devices(devices, all_start=len(devices) > 1)
    config = load(model(tmp_path, GRID.format(*given)), there)
    assert (config.tp, config.pp) == expected
    if there.all_start:
        assert config.world_size == sum(devices)


def test_the_rest_of_the_devices_hold_further_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model(tmp_path, "model_parallel_size: 2\nnum_kv_heads: 2\nnum_layers: 1")
    path.write_text(path.read_text().replace("num_layers: 12\n", ""))
    config = load(path, Devices((7,)))
    assert (config.tp, config.pp, config.dp, config.world_size) == (2, 1, 3, 6)
    path.write_text(
        path.read_text().replace("size: 2\nnum_kv_heads: 2", "size: 7\nnum_kv_heads: 1")
    )
    config = load(path, Devices((5,)))
    assert (config.tp, config.pp, config.dp) == (1, 1, 5)
    assert capsys.readouterr().out == (
        "grid: tp 2 x pp 1 (a.yml:1) takes 2 devices and there are 7: 1 device is not used\n"
        "grid: tp 7 x pp 1 (a.yml:1) needs 7 devices and there are 5: "
        "using tp 1 x pp 1 x dp 5\n"
    )


@pytest.mark.parametrize(
    ("sizes", "cores", "expected"),
    [((2, 2), 2, (2, 2)), ((2, 3), 2, (1, 1)), ((2, 3), 3, (2, 3)), ((1, 1), 8, (1, 1))],
)
def test_a_cpu_takes_two_processes_a_core_or_one(
    sizes: tuple[int, int], cores: int, expected: tuple[int, int], tmp_path: Path
) -> None:
    config = load(model(tmp_path, GRID.format(*sizes)), Devices(cores=cores))
    assert (config.tp, config.pp, config.dp) == (*expected, 1)


def test_what_a_cpu_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(model(tmp_path, GRID.format(2, 3)), Devices(cores=1))
    load(model(tmp_path, "pipe_parallel_size: 6"), Devices(cores=2))
    assert capsys.readouterr().out == (
        "grid: tp 2 x pp 3 (a.yml:1) is 6 processes, more than 2 for each of 1 core: "
        "using tp 1 x pp 1\n"
        "grid: tp 1 x pp 6 (a.yml:1) is 6 processes, more than 2 for each of 2 cores: "
        "using tp 1 x pp 1\n"
    )


def test_what_was_fitted_is_known_as_such(tmp_path: Path) -> None:
    config = load(model(tmp_path, GRID.format(2, 4)), Devices((2,)))
    assert config.origin("model_parallel_size") == "a.yml:1"
    assert config.origin("pipe_parallel_size") == "fitted"
    assert config.is_pipe_parallel and config.pipe_parallel_size == 1
    row = next(row for row in config.describe().splitlines() if row.startswith("pipe_parallel_si"))
    assert row.split() == ["pipe_parallel_size", "1", "fitted"]
    assert str(Problem("too much", "fitted")) == "too much"


def test_no_pipeline_stays_none(tmp_path: Path) -> None:
    zero = "zero_optimization: {stage: 2}\n"
    config = load(model(tmp_path, zero + GRID.format(4, 0)), Devices((2,)))
    assert (config.tp, config.pipe_parallel_size, config.is_pipe_parallel) == (2, 0, False)
    config = load(model(tmp_path, "model_parallel_size: 4"), Devices((2,)))
    assert (config.tp, config.origin("pipe_parallel_size")) == (2, "default")
    # Five heads and stage 2, which excludes the pipeline, leave one device for a copy.
    text = model(tmp_path, zero + GRID.format(5, 0)).read_text().replace(" 24", " 5")
    (tmp_path / "a.yml").write_text(text.replace(" 96", " 20"))
    config = load(tmp_path / "a.yml", Devices((3,)))
    assert (config.tp, config.pipe_parallel_size, config.dp) == (1, 0, 3)


def test_uneven_stages_are_taken_where_the_partition_allows_them(tmp_path: Path) -> None:
    text = GRID.format(1, 6) + "\npipe_partition_method: uniform"
    config = load(model(tmp_path, text), Devices((5,)))
    assert (config.tp, config.pp) == (1, 5)


@pytest.mark.parametrize("there", [Devices((2,)), Devices((3,)), Devices((5,)), Devices((1, 1))])
@pytest.mark.parametrize("purpose", ["train", None])
def test_training_is_told_what_would_fit(
    there: Devices, purpose: str | None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(model(tmp_path, GRID.format(2, 4)), there, purpose)
    advice = {
        2: "Use 8 processes, or, for 2, model_parallel_size: 2 and pipe_parallel_size: 1.",
        3: "Use 8 processes, or, for 3, model_parallel_size: 3 and pipe_parallel_size: 1.",
        5: "Use 8 processes, or, for 5, model_parallel_size: 1 and pipe_parallel_size: 1.",
    }
    assert str(caught.value) == (
        f"a.yml:1: the run has {there.count} processes, but one copy of the model takes "
        f"model_parallel_size (2) x pipe_parallel_size (4) = 8. {advice[there.count]}"
    )


def test_the_advice_is_the_next_larger_copy_whatever_else_is_wrong(tmp_path: Path) -> None:
    path = model(tmp_path, "model_parallel_size: 2\nmin_lr: 1.0\npipe_parallel_size: 1")
    with pytest.raises(ConfigError) as caught:
        load(path, Devices((9,)), "train")
    _, world, rate = str(caught.value).splitlines()
    assert world.endswith(
        "Use 8 or 10 processes, or, for 9, model_parallel_size: 3 and pipe_parallel_size: 1."
    )
    assert "min_lr" in rate


def test_training_takes_every_process(tmp_path: Path) -> None:
    path = model(tmp_path, GRID.format(2, 3) + "\ntrain_micro_batch_size_per_gpu: 1")
    assert load(path, Devices((12,)), "train").dp == 2
    assert load(path, Devices(cores=1), "train").world_size == 6


def test_several_hosts_that_do_not_divide_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 6 processes.* = 4\. Use 4 or 8 .*, or, for 6, "):
        load(model(tmp_path, GRID.format(2, 2)), Devices((3, 3), all_start=True))


def test_logits_keep_the_grid_and_take_one_copy(tmp_path: Path) -> None:
    path = model(tmp_path, GRID.format(2, 2))
    path.write_text(path.read_text().replace("CharLevelTokenizer", "GPT2BPETokenizer"))
    for there in (Devices((9,)), Devices((4,)), Devices(cores=1)):
        config = load(path, there, "logits")
        assert (config.tp, config.pp, config.world_size) == (2, 2, 4)
    assert load(path, Devices((4, 4), all_start=True), "logits").dp == 2
    with pytest.raises(ConfigError, match=r"has 2 processes.*= 4"):
        load(path, Devices((2,)), "logits")
    path.write_text(path.read_text().replace("load: here\n", ""))
    with pytest.raises(ConfigError, match="load is missing"):
        load(path, Devices((4,)), "logits")


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ("model_parallel_size: two", 'model_parallel_size is "two"'),
        ("model_parallel_size: 8\nnum_kv_heads: many", 'num_kv_heads is "many"'),
        ("model_parallel_size: 8\nzero_optimization: {stage: 4}", "stage is 4"),
    ],
)
def test_a_wrong_value_is_the_only_thing_that_is_told(
    spoiled: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(model(tmp_path, spoiled), Devices((2,)))
    assert "problems" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_missing_sizes_of_the_model_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("model_parallel_size: 8\n")
    with pytest.raises(ConfigError, match="num_layers, hidden_size"):
        load(tmp_path / "a.yml", Devices((2,)))


def test_unknown_devices_leave_the_grid_as_it_is(tmp_path: Path) -> None:
    config = load(model(tmp_path, GRID.format(8, 4)), None)
    assert (config.tp, config.pp, config.world_size) == (8, 4, 32)
