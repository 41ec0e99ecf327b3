"""What a checkpoint says about its architecture, by its files of every kind, and where."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neox import log
from neox.checkpoint.hf.files import TransformersFiles
from neox.checkpoint.manifest import MANIFEST
from neox.checkpoint.mesh import MeshFiles
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import load_model_file, model_file
from neox.checkpoint.tensor_facts import Fact, Facts, tensor_facts
from neox.config import source
from neox.config.architecture import DEFAULTS, TRAITS, fitting, same, traits
from neox.config.hf import CONFIG
from neox.config.values import show
from neox.errors import CheckpointError, ConfigError

# A YAML file that contradicts the tensors otherwise is of another model. In these it may differ: a
# layer's file may be missing or taken out, and what intermediate_size means for a gated MLP has
# changed with upstream's versions.
_LOOSE = ("num_layers", "no_weight_tying", "ffn_size")


@dataclass(frozen=True)
class Description:
    """The keys that a text gives. If it is `whole`, those it leaves out have NeoX's defaults.

    `strange` keys have values that nobody knows here, so they are as good as unknown.
    """

    where: str
    given: Mapping[str, Fact]
    whole: bool
    strange: frozenset[str] = frozenset()

    def values(self) -> dict[str, Any]:
        values = dict(DEFAULTS) if self.whole else {}
        values |= {key: fact.value for key, fact in self.given.items()}
        return {key: value for key, value in values.items() if key not in self.strange}

    def facts(self) -> Facts:
        """By trait, each with the place of what sets it."""
        return {
            name: Fact(value, self._place(TRAITS[name].keys))
            for name, value in traits(self.values()).items()
        }

    def _place(self, keys: tuple[str, ...]) -> str:
        given = {key: self.given[key] for key in keys if key in self.given}
        if len(keys) > 1:  # of several, those that make a difference, by name
            places = [
                f"{key}: {show(fact.value)}, {fact.where}"
                for key, fact in given.items()
                if fact.value != DEFAULTS[key]
            ]
        else:
            places = [fact.where for fact in given.values()]
        return "; ".join(places) or f"{self.where}: not set, so the default"


@dataclass(frozen=True)
class Evidence:
    """`facts` by trait, and the whole description behind them where there is one."""

    facts: Facts
    whole: Description | None


def collect(checkpoint: Checkpoint) -> Evidence:
    """All that a checkpoint says. Where its files contradict one another, the stronger is believed.

    A manifest or a config.json has every key, and stands alone. Otherwise tensors come first, then
    `args` of mp_rank_00, then the YAML files that were kept. Not collective; every rank finds the
    same. Raises CheckpointError for layers that cannot be read.
    """
    stated = _stated(checkpoint)
    if stated is not None:
        return Evidence(stated.facts(), stated)
    facts = tensor_facts(checkpoint)
    _add(facts, _arguments(checkpoint))
    yaml = _yaml(checkpoint)
    if yaml is None or not _fits(yaml, facts):
        return Evidence(facts, None)
    _add(facts, yaml.facts())
    return Evidence(facts, yaml if yaml.whole else None)


def _add(facts: Facts, weaker: Facts) -> None:
    """A weaker source that agrees has the exact number, and a place that can be looked up."""
    for name, fact in weaker.items():
        if name not in facts or _agree(facts[name], fact):
            facts[name] = fact


def _agree(known: Fact, other: Fact) -> bool:
    return same(known.value, other.value, known.tolerance)


def _stated(checkpoint: Checkpoint) -> Description | None:
    """Of this program's manifest, or of another program's folder."""
    if checkpoint.manifest is not None and checkpoint.manifest.architecture:
        where = f"{_name(checkpoint)}/{MANIFEST}"
        return _description(where, checkpoint.manifest.architecture, whole=True)
    if isinstance(checkpoint.source, TransformersFiles):
        folder, where = checkpoint.source.config, f"{_name(checkpoint)}/{CONFIG}"
        values = fitting(folder.values)
        given = {key: Fact(value, f"{where}, {folder.said(key)}") for key, value in values.items()}
        return Description(where, given, whole=True)
    if isinstance(checkpoint.source, MeshFiles):
        known = fitting(checkpoint.source.config.values)
        found = _description(_name(checkpoint), known, whole=True)
        return replace(found, strange=frozenset(checkpoint.source.config.untold))
    return None


def _description(where: str, values: Mapping[str, Any], *, whole: bool) -> Description:
    return Description(where, {k: Fact(v, where) for k, v in fitting(values).items()}, whole)


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.folder.absolute().name


def _arguments(checkpoint: Checkpoint) -> Facts:
    """Upstream keeps eight arguments in its mp_rank files. These may be of any kind, or not be."""
    path = model_file(checkpoint.folder, 0)
    try:
        arguments = load_model_file(path).get("args") if path.is_file() else None
    except CheckpointError:
        return {}
    if not isinstance(arguments, Mapping):
        return {}
    return _description(f"{_name(checkpoint)}/{path.name}", arguments, whole=False).facts()


def kept_values(checkpoint: Checkpoint, keys: Collection[str]) -> dict[str, Any]:
    """Those of `keys`, of any section, that the kept YAML files give; of several the first."""
    documents = [document for folder in _kept(checkpoint) for document in _documents(folder)[0]]
    given = {
        key: value for document in reversed(documents) for key, value in document.values.items()
    }
    return {key: given[key] for key in keys if key in given}


def _kept(checkpoint: Checkpoint) -> list[Path]:
    """Folders of YAML files: in the step's folder or, as with the 20B weights, beside it."""
    step = checkpoint.folder
    beside = re.match(r"global_step\d+$", _name(checkpoint))
    return [step / "configs", step.parent / "configs"] if beside else [step / "configs"]


def _yaml(checkpoint: Checkpoint) -> Description | None:
    for folder in _kept(checkpoint):
        try:
            found = _merged(folder)
        except ConfigError as error:
            log.warning(f"{folder} is not compared with the configuration: {error}")
            continue
        if found is not None:
            return found
    return None


def _merged(folder: Path) -> Description | None:
    """One description of all files in `folder`. Raises ConfigError when they are of several."""
    where = "/".join(folder.absolute().parts[-2:])
    given: dict[str, Fact] = {}
    strange: set[str] = set()
    documents, are_all = _documents(folder)
    for document in documents:
        values = fitting(document.values)
        for key, value in values.items():
            fact = Fact(value, f"{where}/{document.name}:{document.lines.get(key, 1)}")
            if key in given and given[key].value != value:
                raise ConfigError(
                    f"{key} is {show(given[key].value)} ({given[key].where}) and {show(value)} "
                    f"({fact.where})."
                )
            given.setdefault(key, fact)
        strange |= {k for k, v in document.values.items() if v is not None} - values.keys()
    if not given:
        return None
    whole = are_all and "num_layers" in given and "hidden_size" in given
    return Description(where, given, whole, frozenset(strange))


def _documents(folder: Path) -> tuple[list[source.Source], bool]:
    """What can be read, and whether that is all; what cannot is told."""
    found, are_all = [], True
    for path in sorted(folder.glob("*")):
        if path.suffix in source.SUFFIXES and path.is_file():
            try:
                found.append(source.read(path))
            except ConfigError as error:
                log.warning(f"{folder}: a file that cannot be read is left aside: {error}")
                are_all = False
    return found, are_all


def _fits(yaml: Description, facts: Facts) -> bool:
    """Whether the YAML files are those of these tensors; if not, say so."""
    for name, fact in yaml.facts().items():
        known = facts.get(name)
        if known is not None and name not in _LOOSE and not _agree(known, fact):
            log.warning(
                f"{yaml.where} is not compared with the configuration: it is of another model, by "
                f"{TRAITS[name].keys[0]} ({fact.where}) and the files ({known.where})."
            )
            return False
    return True
