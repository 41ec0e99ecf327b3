"""The kernels, for each instruction set that this machine has, against torch: the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from neox.kernels import build, library
from neox.kernels.build import instruction_sets
from neox.model import packed
from neox.model.packed import pack

SHAPES = [(48, 128), (50, 100), (1, 1), (33, 1024), (300, 257)]  # rows, columns


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Choose kernels with `use`; those that were in use come back."""
    yield monkeypatch
    monkeypatch.undo()
    library.library.cache_clear()


def use(chosen: pytest.MonkeyPatch, name: str) -> None:
    chosen.setenv("NEOX_KERNELS", name)
    library.library.cache_clear()
    assert (library.library() is None) == (name == "off")


def weight(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    w = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    w[:, columns // 2 :: 7] *= 8.0  # outliers
    w[-1, : columns // 2] = 0.0  # groups without a scale
    return w


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_as_torch_packs(chosen: pytest.MonkeyPatch, name: str, bits: int) -> None:
    for shape in SHAPES:
        use(chosen, "off")
        expected = pack(weight(*shape), bits)
        use(chosen, name)
        found = pack(weight(*shape), bits)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("bits", [8, 4])
def test_multiplied_as_torch_multiplies(chosen: pytest.MonkeyPatch, name: str, bits: int) -> None:
    for shape in SHAPES:
        held = pack(weight(*shape), bits)
        bias = torch.randn(shape[0])
        for rows in (1, 2, 7, 13):
            x = torch.randn(rows, shape[1])
            x[0] = 0.0
            use(chosen, "off")
            expected = held.multiply(x, bias)
            use(chosen, name)
            assert torch.equal(held.multiply(x, bias), expected), (shape, rows)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_row_does_not_depend_on_the_others(bits: int) -> None:
    held, x = pack(weight(300, 257), bits), torch.randn(29, 257)
    together = held.multiply(x)
    for i in range(len(x)):
        assert torch.equal(held.multiply(x[i : i + 1])[0], together[i])


@pytest.mark.parametrize("bits", [8, 4])
def test_errors_are_those_of_the_best_scale(bits: int) -> None:
    """At 8 bits half a step at most; at 4 no more in all than with 8 steps to the largest value."""
    w, group = weight(64, 256), packed.GROUP[bits]
    held = pack(w, bits)
    groups = w.unflatten(1, (-1, group))
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    error = (held.dequantize() - w).unflatten(1, (-1, group))
    if bits == 8:  # the scale has 8 bits of its own: steps are up to 1/128 larger than need be
        assert (error.abs() <= peak.abs() / 127 * 0.51).all()
    else:
        step = peak / -8 + (peak == 0)
        plain = (groups / step).round().clamp(-8, 7) * step - groups
        assert error.square().sum() < 0.96 * plain.square().sum()
    rows = torch.tensor([[63, 0], [5, 5]])
    assert torch.equal(held.look_up(rows, torch.float32), held.dequantize()[rows])


@pytest.mark.parametrize("name", instruction_sets())
def test_32_bits_are_what_they_were(chosen: pytest.MonkeyPatch, name: str) -> None:
    use(chosen, name)
    for shape in SHAPES:
        w, bias = weight(*shape), torch.randn(shape[0])
        held = pack(w, 32)
        assert torch.equal(held.dequantize(), w)
        assert torch.equal(held.look_up(torch.tensor([shape[0] - 1]), torch.float32)[0], w[-1])
        x = torch.randn(5, 3, shape[1])
        y = held.multiply(x, bias)
        exact = linear(x.double(), w.double(), bias.double())
        # Partial sums of 256 products, each with a rounding of at most 2^-24 of what was added.
        assert ((y - exact).abs() <= 2**-24 * 260 * linear(x.abs(), w.abs(), bias.abs())).all()
        assert torch.equal(held.multiply(x[4, 2], bias), y[4, 2])


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(number: float) -> None:
    x = torch.randn(3, 64)
    x[1, 17] = number
    y = pack(weight(32, 64), 8).multiply(x)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    w = weight(32, 64)
    w[3, 3] = number
    with pytest.raises(ValueError, match="not finite"):
        pack(w, 8)


def kept_in(folder: Path) -> list[Path]:
    return sorted((folder / "neox").glob("*.so"))


def test_a_library_is_kept_and_used_again(chosen: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.open_library(["plain"]) is not None
    (kept,) = kept_in(tmp_path)
    chosen.setattr(build.subprocess, "run", None)  # nothing is compiled
    assert build.open_library(["plain"]) is not None
    chosen.undo()
    chosen.setenv("XDG_CACHE_HOME", str(tmp_path))
    whole = kept.read_bytes()
    kept.unlink()  # the file that this process has mapped stays as it is
    kept.write_bytes(whole[:-5000])  # which would crash the process that loads it
    assert build.open_library(["plain"]) is not None
    assert kept.read_bytes() == whole


def test_nothing_is_run_from_where_others_may_write(
    chosen: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "neox").mkdir()
    (tmp_path / "neox").chmod(0o777)
    assert build.open_library(["plain"]) is not None
    assert kept_in(tmp_path) == []
    (tmp_path / "neox").chmod(0o700)
    assert build.open_library(["plain"]) is not None
    (kept,) = kept_in(tmp_path)
    kept.chmod(0o666)
    before = kept.stat().st_mtime_ns
    assert build.open_library(["plain"]) is not None
    assert kept.stat().st_mtime_ns > before


def test_a_machine_without_a_compiler_says_so(
    chosen: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen.setenv("CXX", "sh -c 'echo first; echo library.cpp: error: too old >&2; exit 1'")
    assert build.open_library(["avx2", "plain"]) is None
    chosen.delenv("CXX")
    chosen.setenv("PATH", str(tmp_path))
    assert build.open_library(["plain"]) is None
    assert capfd.readouterr().out == (
        "no kernels for this CPU, torch works more slowly: library.cpp: error: too old\n"
        "no kernels for this CPU, torch works more slowly: there is no g++ (or $CXX)\n"
    )
    assert kept_in(tmp_path) == []


@pytest.mark.parametrize("bits", [8, 4])
def test_the_tiniest_numbers_are_zeros(chosen: pytest.MonkeyPatch, bits: int) -> None:
    held, x = pack(weight(32, 64), bits), torch.full((2, 64), 1e-38)
    for name in ("off", *instruction_sets()):
        use(chosen, name)
        assert torch.equal(held.multiply(x), torch.zeros(2, 32))


def test_an_unknown_choice_is_told(
    chosen: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen.setenv("NEOX_KERNELS", "mmx")
    library.library.cache_clear()
    assert library.library() is not None
    assert "NEOX_KERNELS=mmx is not one of" in capfd.readouterr().err
