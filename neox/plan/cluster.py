"""What a cluster can do: rates of its devices and links, and what of them a training reaches.

A cluster is a small YAML file (configs/clusters/ has some), or `here`: this machine, measured.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from neox.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "configs" / "clusters"
HERE = "here"
GIGA, TERA, MICRO = 1e9, 1e12, 1e-6


@dataclass(frozen=True)
class Reached:
    """The share of what a device or link can do that a training reaches.

    CALIBRATED is fitted to published runs by benchmarks/published_runs.py, which checks it
    with others.
    """

    products: float = 1.0  # of the peak arithmetic rate, in matrix products
    memory: float = 1.0  # of the memory's bandwidth
    links: float = 1.0  # of a link's bandwidth, in collectives and sends


CALIBRATED = Reached(products=0.719, memory=0.796, links=0.837)


@dataclass(frozen=True)
class Link:
    """What one device can send, and at the same time receive."""

    bandwidth: float  # bytes/s
    latency: float = 0.0  # s, of one message


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind in machines of one kind, as many as a run asks for."""

    name: str
    device: str
    memory: float  # bytes of one device
    peak: Mapping[str, float]  # FLOP/s of one device in matrix products, by dtype
    bandwidth: float  # bytes/s of one device's memory
    devices_per_node: int
    node: Link  # between devices of one machine
    network: Link  # between machines, for each device
    price: float | None = None  # of one device for an hour, in the currency of your choice
    reached: Reached = field(default=CALIBRATED)
    shared: bool = False  # one machine whose cores and memory all ranks share

    def for_ranks(self, ranks: int) -> Cluster:
        """What each of `ranks` processes has: of a shared machine its part."""
        if not self.shared or ranks == 1:
            return self
        return replace(
            self,
            memory=self.memory / ranks,
            peak={dtype: rate / ranks for dtype, rate in self.peak.items()},
            bandwidth=self.bandwidth / ranks,
            devices_per_node=ranks,
            shared=False,
        )

    def product_rate(self, dtype: str) -> float:
        """FLOP/s that matrix products reach. ConfigError when the file lacks the dtype."""
        if dtype not in self.peak:
            raise ConfigError(
                f"{self.name} gives no peak_tflops for {dtype}, only for "
                f"{', '.join(self.peak)}; add it, or choose another precision."
            )
        return self.peak[dtype] * self.reached.products

    @property
    def memory_rate(self) -> float:
        """Bytes/s that element-wise work reaches."""
        return self.bandwidth * self.reached.memory


def built_in() -> list[str]:
    """Names that `--cluster` takes besides files."""
    return [*sorted(path.stem for path in FOLDER.glob("*.yml")), HERE]


def load_cluster(name: str | Path) -> Cluster:
    """A cluster by the name of a built-in one, `here`, or a YAML file.

    ConfigError when there is no such file, or a value is missing, unknown or out of its range.
    """
    if str(name) == HERE:
        from neox.plan.here import measure

        return measure()
    path = FOLDER / f"{name}.yml" if str(name) in built_in() else Path(name)
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        near = difflib.get_close_matches(str(name), built_in(), 1)
        hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(built_in())}."
        raise ConfigError(f"{name} is no cluster file. {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is no YAML: {' '.join(str(error).split())}") from None
    return _Reader(str(name), content).cluster(path.stem)


@dataclass(frozen=True)
class _Reader:
    """Takes values out of a mapping; its `where` begins every message."""

    where: str
    content: Any

    def cluster(self, name: str) -> Cluster:
        self._check_keys(
            "device", "memory_gb", "peak_tflops", "memory_gb_per_s", "devices_per_node",
            "node", "network", "price_per_device_hour", "reached",
        )  # fmt: skip
        devices = self._number("devices_per_node")
        if devices != int(devices):
            raise ConfigError(
                f"{self.where}: devices_per_node is {devices:g}; give a whole number."
            )
        peak = self._section("peak_tflops")
        peak._check_keys("float32", "bfloat16", "float16")
        if not peak.content:
            raise ConfigError(f"{self.where}: peak_tflops is empty; give it for one dtype or more.")
        price = self.content.get("price_per_device_hour")
        return Cluster(
            name=name,
            device=str(self.content.get("device", name)),
            memory=self._number("memory_gb") * GIGA,
            peak={dtype: peak._number(dtype) * TERA for dtype in peak.content},
            bandwidth=self._number("memory_gb_per_s") * GIGA,
            devices_per_node=int(devices),
            node=self._section("node")._link(),
            network=self._section("network")._link(),
            price=None if price is None else self._number("price_per_device_hour"),
            reached=self._reached(),
        )

    def _link(self) -> Link:
        self._check_keys("gb_per_s", "latency_us")
        latency = self._number("latency_us") if "latency_us" in self.content else 0.0
        return Link(self._number("gb_per_s") * GIGA, latency * MICRO)

    def _reached(self) -> Reached:
        if "reached" not in self.content:
            return CALIBRATED
        section = self._section("reached")
        names = [f.name for f in fields(Reached)]
        section._check_keys(*names)
        shares = {name: section._number(name) for name in names if name in section.content}
        for name, share in shares.items():
            if share > 1:
                raise ConfigError(f"{section.where}: {name} is {share:g}; a share is at most 1.")
        return replace(CALIBRATED, **shares)

    def _section(self, key: str) -> _Reader:
        if key not in self.content:
            raise ConfigError(f"{self.where} lacks {key}.")
        return _Reader(f"{self.where}: {key}", self.content[key])

    def _check_keys(self, *known: str) -> None:
        if not isinstance(self.content, dict):
            raise ConfigError(f"{self.where} is {self.content!r}; give keys: {', '.join(known)}.")
        for key in self.content:
            if key not in known:
                raise ConfigError(f"{self.where} has {key!r}; known are {', '.join(known)}.")

    def _number(self, key: str) -> float:
        value = self.content.get(key)
        if value is None:
            raise ConfigError(f"{self.where} lacks {key}.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise ConfigError(f"{self.where}: {key} is {value!r}; give a number above 0.")
        return float(value)
