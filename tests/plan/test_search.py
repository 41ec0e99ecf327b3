"""`./deepy.py plan.py`: its tables, its search, and what it must not do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neox.cluster.main import main
from neox.config import from_dict
from neox.plan.memory import memory
from neox.plan.search import Models, evaluate, grids, nearest, search
from neox.plan.trace import planned_world
from tests.models import BASE

REPOSITORY = Path(__file__).parents[2]
PLENTY = 1e12


def config_on(devices: int, **values: Any) -> Any:
    given = {**BASE, "train_micro_batch_size_per_gpu": 2, **values}
    return from_dict(given, world_size=devices)


def test_grids_are_those_that_the_checks_let_pass() -> None:
    config = config_on(8, num_layers=4, model_parallel_size=2, gradient_accumulation_steps=2)
    found = list(grids(config, 8))
    assert {c.train_batch_size for c in found} == {config.train_batch_size} == {16}
    assert all(c.tp * c.pp * c.dp == 8 and 4 % c.pp == 0 and 4 % c.tp == 0 for c in found)
    assert all(
        c.dp * c.train_micro_batch_size_per_gpu * c.gradient_accumulation_steps == 16 for c in found
    )
    shapes = {(c.tp, c.pp) for c in found}
    # 4 heads and 4 layers; 8 divides neither.
    assert shapes == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)}
    sharded = config_on(8, num_layers=4, zero_optimization={"stage": 2})
    assert {c.pp for c in grids(sharded, 8)} == {1}  # ZeRO 2 goes with no pipeline


def test_search_says_what_a_plan_of_each_grid_says() -> None:
    config = config_on(4, seq_length=64, max_position_embeddings=64, hidden_dropout=0.1)
    with planned_world():
        found = search(Models(64, on_cpu=True), config, 4, PLENTY)
        for candidate in found:
            model = Models(64, on_cpu=True).of(candidate.config)  # which knows nothing yet
            needed = max(stage.total for stage in memory(model))
            assert candidate.needed == pytest.approx(needed, rel=1e-3), candidate.name
    assert len(found) > 20 and all(candidate.fits for candidate in found)
    assert [c.needed for c in found] == sorted(c.needed for c in found)


def test_what_does_not_fit_and_the_nearest_that_does() -> None:
    config = config_on(4, hidden_size=256, num_attention_heads=4)
    with planned_world():
        models = Models(64, on_cpu=True)
        whole = search(models, config, 4, PLENTY)
        least, most = whole[0].needed, whole[-1].needed
        room = 1e9 + (least + most) / 2
        some = search(models, config, 4, room)
        assert not evaluate(models, config, 1e9 + least - 1, None).fits
    assert 0 < sum(c.fits for c in some) < len(some)
    assert [c.fits for c in some] == sorted((c.fits for c in some), reverse=True)
    assert all((c.needed + 1e9 <= room) == c.fits for c in some)
    best = nearest(some, config)
    assert best is not None and best.fits
    assert nearest([c for c in some if not c.fits], config) is None


def test_20b_in_little_memory_and_without_a_device(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    code = (
        "import sys\n"
        "from neox.cluster.main import main\n"
        "status = main(sys.argv[1:])\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'deepspeed' not in sys.modules and 'megatron' not in sys.modules\n"
        # Not getrusage, which counts what the process was forked from.
        "lines = open('/proc/self/status').read().splitlines()\n"
        "print('peak', next(line.split()[1] for line in lines if line.startswith('VmHWM')))\n"
        "sys.exit(status)\n"
    )
    command = [sys.executable, "-c", code, "plan.py", "configs/20B.yml", "--search"]
    command += ["--devices", "96", "--cluster", "a100-40gb", "--json", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    # Weights alone are 41 GB; the libraries are what there is.
    assert int(done.stdout.rpartition("peak ")[2]) * 1024 < 1.5e9
    plan = json.loads(out.read_text())
    assert plan["parameters"] == 20_554_567_680  # as its file says
    assert plan["fits"] and len(plan["search"]) >= 100
    fitting = [c["seconds"] for c in plan["search"] if c["fits"]]
    assert fitting == sorted(fitting) and None not in fitting
    assert "stage 3" in done.stdout and "fits        yes" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "0"], "--devices is 0, but a run has one or more"),
        (["--devices", "7"], "the run has 7 processes"),
        (["--vocab_size", "0"], "a vocabulary has a token or more"),
        (["--cluster", "a100-40g"], "Did you mean a100-40gb?"),
        (["--json", "/proc/plan.json"], "--json /proc/plan.json cannot be written"),
        (["--picture", "a.gif"], "a picture's name ends with .png, .svg, .pdf"),
        (["--picture", "a.svg"], "--picture shows times, which need --cluster"),
        (["--set", "model_parallel_size=3"], "num_attention_heads (64) is not divisible"),
    ],
)
def test_wrong_input_is_a_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan.py", str(REPOSITORY / "configs/20B.yml"), *words]) == 2
    assert message in capsys.readouterr().err


def test_what_is_an_estimate_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    zero_3 = "zero_optimization={stage: 3, offload_optimizer: {device: cpu}}"
    words = ["--devices", "8", "--set", zero_3, "--set", "pipe_parallel_size=0"]
    for given, count in ((words, 2), ([], 0)):
        assert main(["plan.py", str(REPOSITORY / "configs/demo.yml"), *given]) == 0
        assert capsys.readouterr().out.count("estimate    ") == count


def test_a_price_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = (REPOSITORY / "configs/clusters/h100.yml").read_text()
    assert "\n# price_per_device_hour: 2 " in shipped
    mine = tmp_path / "mine.yml"
    mine.write_text(shipped.replace("# price", "price"))
    out = tmp_path / "plan.json"
    words = ["configs/20B.yml", "--devices", "96", "--cluster", str(mine), "--json", str(out)]
    assert main(["plan.py", str(REPOSITORY / words[0]), *words[1:]]) == 0
    time = json.loads(out.read_text())["time"]
    assert time["run, price"] == pytest.approx(2 * time["run, device hours"])
    assert "  run, price" in capsys.readouterr().out


def test_flags_of_a_plan_are_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train.py", str(REPOSITORY / "configs/20B.yml"), "--search"]) == 2
    assert "--search is for plan.py" in capsys.readouterr().err


def test_a_stage_with_nothing_to_train_is_refused_as_in_training(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_on(2, lora={"rank": 4}, pipe_partition_method="type:finalnorm")
    with planned_world():
        assert {c.config.pp for c in search(Models(64, on_cpu=True), config, 2, PLENTY)} == {1}
    command = ["plan.py", str(REPOSITORY / "configs" / "125M.yml"), "--devices", "2"]
    command += ["--set", "pipe_parallel_size=2", "--set", "lora={rank: 4}"]
    for method, said in (
        ("type:finalnorm", "leaves stage 1 of 2 without weights to train. Use type:transformer"),
        ("type:[", "type:[ is no pattern: unterminated character set"),
        ("type:nothing", "matches no layer. The layers are Embedding, TransformerLayer"),
    ):
        assert main([*command, "--set", f"pipe_partition_method={method}"]) == 2
        assert said in capsys.readouterr().err
    sharded = ["pipe_parallel_size=0", "zero_optimization.stage=3"]
    assert main([*command, *(word for value in sharded for word in ("--set", value))]) == 2
    assert "zero_optimization.stage is 3, which shards" in capsys.readouterr().err
