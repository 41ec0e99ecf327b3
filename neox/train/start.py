"""What a training run starts from: nothing, a checkpoint's weights, or a run to be resumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neox import log
from neox.checkpoint.architecture import check_architecture
from neox.checkpoint.directory import steps
from neox.checkpoint.folders import holds_weights, latest_name, resolve
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.optimizer_files import WITHOUT_OPTIMIZER, has_plain_state, optimizer_files
from neox.checkpoint.peft import Adapters, find_adapter, read_adapters
from neox.checkpoint.sources import AdapterFiles, load_model_file, model_file
from neox.checkpoint.verify import tell_newer, telling_another, verify
from neox.config import NeoXConfig
from neox.errors import CheckpointError, DamageError
from neox.model.frozen import configured_specs
from neox.parallel.groups import ProcessGroups


@dataclass(frozen=True)
class Start:
    """Steps already done, where the weights come from, and whether optimizer state comes too.

    With `lora`, the weights are those of the model that stays as it is; `adapters` is the folder of
    the adapters to go on from, and `own` the run's checkpoint that is resumed, which holds them.
    """

    iteration: int = 0
    checkpoint: Checkpoint | None = None
    with_optimizer: bool = False
    adapters: Path | None = None
    own: Checkpoint | None = None

    @property
    def resumed(self) -> Checkpoint | None:
        """The checkpoint of the run that goes on."""
        return self.own or self.checkpoint


def find_start(config: NeoXConfig, groups: ProcessGroups) -> Start:
    """Decide from `load`, `iteration`, `finetune` and what the checkpoint holds; say it in a line.

    The files that will be read are verified. A damaged checkpoint is never used: a run that just
    goes on takes the newest older one that is whole, with a warning. Where a certain one is asked
    for, by `iteration` or for fine-tuning, it is an error. Collective over the world: the ranks
    share the verification. Raises CheckpointError.
    """
    if config.load is None:
        return Start()
    if config.lora is not None:
        return _find_adapters(config, groups)
    directory = Path(config.load)
    if config.iteration is None and _is_own(config) and not _holds_checkpoints(directory):
        log.info(f"load: no checkpoint in {directory} yet, starting from fresh weights")
        return Start()
    weights_only = config.finetune or config.no_load_optim
    if config.iteration is None and not config.finetune:
        checkpoint = _newest_whole(config, directory, weights_only, groups)
    else:
        checkpoint = _whole(config, directory, weights_only, groups)
    check_architecture(config, checkpoint, finetune=config.finetune)
    if config.finetune:
        log.info(f"finetune: weights of {checkpoint.folder}, fresh optimizer, iteration 0")
        return Start(0, checkpoint)
    iteration = checkpoint.iteration
    if config.no_load_optim:
        log.info(f"resuming {checkpoint.folder} without its optimizer state (no_load_optim)")
        return Start(iteration, checkpoint)
    folder = checkpoint.folder
    if optimizer_files(folder, checkpoint.tp) is None and not has_plain_state(folder):
        log.info(f"{folder} holds no optimizer state: starting a fresh optimizer")
        return Start(iteration, checkpoint)
    _check_optimizer(config, folder)
    log.info(f"resuming {checkpoint.folder} at iteration {iteration}")
    return Start(iteration, checkpoint, with_optimizer=True)


def _find_adapters(config: NeoXConfig, groups: ProcessGroups) -> Start:
    """The model in `load`, and with it the run's own newest adapters, or those in `adapter`."""
    base = _whole(config, Path(config.load or ""), True, groups)
    check_architecture(config, base, finetune=True)
    log.info(f"lora: the weights of {base.folder} stay as they are")
    directory = Path(config.save) if config.save else None
    if directory is not None and _holds_checkpoints(directory):
        own = _newest_whole(config, directory, config.no_load_optim, groups)
        if not isinstance(own.source, AdapterFiles):
            raise CheckpointError(
                f"save: {directory} holds the checkpoints of a run that trained whole models, and "
                "lora saves adapters. Give save a folder of its own."
            )
        has_state = optimizer_files(own.folder, own.tp) is not None or has_plain_state(own.folder)
        with_optimizer = has_state and not config.no_load_optim
        if with_optimizer:
            _check_optimizer(config, own.folder)
        log.info(f"resuming {own.folder} at iteration {own.iteration}")
        return Start(own.iteration, base, with_optimizer, own.folder, own)
    if config.adapter is not None:
        folder = groups.gather(find_adapter(Path(config.adapter)))[0]
        log.info(f"adapter: starting from those in {folder}")
        return Start(0, base, adapters=folder)
    return Start(0, base)


def read_start(config: NeoXConfig, start: Start, padded_vocab_size: int) -> Adapters | None:
    """The adapters that a run goes on from. Raises CheckpointError if `lora` has others."""
    if start.adapters is None:
        return None
    found = read_adapters(start.adapters, config, padded_vocab_size)
    wanted = configured_specs(config)
    for place in sorted(wanted.keys() | found.specs.keys()):
        one, other = wanted.get(place), found.specs.get(place)
        index, name = place
        if one is None or other is None:
            lacking, having = ("lora", "it") if one is None else ("it", "lora")
            raise CheckpointError(
                f"{start.adapters}: {having} has an adapter of {name} of layer {index:02d}, and "
                f"{lacking} has none. Give lora.targets the matrices that the adapters are of."
            )
        if (one.rank, one.scaling) != (other.rank, other.scaling):
            raise CheckpointError(
                f"{start.adapters}: its adapter of {name} of layer {index:02d} has rank "
                f"{other.rank} and alpha {other.rank * other.scaling:g}, but lora has {one.rank} "
                f"and {one.rank * one.scaling:g}. Give lora the adapters' values."
            )
    return found


def _check_optimizer(config: NeoXConfig, folder: Path) -> None:
    """Raises CheckpointError for another optimizer's state, if the checkpoint says whose it is."""
    saved = load_model_file(model_file(folder, 0)).get("optimizer_type")
    if saved not in (None, config.optimizer_state):
        raise CheckpointError(
            f"{folder}: its optimizer state is that of {saved}, and this run's optimizer is "
            f"{config.optimizer_type}. {WITHOUT_OPTIMIZER}"
        )


def _newest_whole(
    config: NeoXConfig, directory: Path, weights_only: bool, groups: ProcessGroups
) -> Checkpoint:
    """What `latest` names, or where that is damaged the newest older one that is not."""
    candidates = groups.gather(_candidates(directory))[0]  # another run may be saving there
    if not candidates:
        return _whole(config, directory, weights_only, groups)
    damaged = []
    for folder in candidates:
        problems = verify(folder, groups, weights_only=weights_only)
        if not problems:
            if not damaged:
                tell_newer(folder)
            return _verified(Checkpoint.open(folder))
        damaged.append(_told(problems))
        log.warning(f"load: {folder.name} is damaged, and not used: {damaged[-1]}")
    raise CheckpointError(
        f"load: no checkpoint in {directory} can be resumed. {' '.join(damaged[:3])}"
        f"{_without_optimizer(candidates[0], weights_only, groups)}"
    )


def _candidates(directory: Path) -> list[Path]:
    """The step folders to resume from, in order of preference; none where there are no steps."""
    found = steps(directory) if directory.is_dir() else []
    if not found:
        return []
    name = latest_name(directory)
    named = directory / name
    if named not in found:
        if name and named.is_dir():
            return [named]  # not a step by its name, so none is known to be older
        what = f"names {name}, which is not there" if name else "is missing or empty"
        log.warning(f"load: `latest` in {directory} {what}: looking for the newest checkpoint")
        return found
    return found[found.index(named) :]


def _whole(
    config: NeoXConfig, directory: Path, weights_only: bool, groups: ProcessGroups
) -> Checkpoint:
    """The one that is asked for. Raises CheckpointError when it is damaged."""
    folder = groups.gather(resolve(directory, config.iteration))[0]
    with telling_another(folder, groups):
        checkpoint = Checkpoint.open(folder, config=config)
        problems = verify(folder, groups, weights_only=weights_only)
        if problems:
            advice = _without_optimizer(folder, weights_only, groups)
            raise DamageError(f"{_told(problems)}{advice}")
    return _verified(checkpoint)


def _told(problems: list[str]) -> str:
    more = f" There are {len(problems) - 2} more such files." if len(problems) > 2 else ""
    return f"{' '.join(problems[:2])}{more}"


def _without_optimizer(folder: Path, weights_only: bool, groups: ProcessGroups) -> str:
    if weights_only or verify(folder, groups, weights_only=True):
        return ""
    return f" The weights of {folder.name} are whole. {WITHOUT_OPTIMIZER}"


def _verified(checkpoint: Checkpoint) -> Checkpoint:
    for index in checkpoint.indices:
        checkpoint.verified.update(checkpoint.source.files(index))
    return checkpoint


def _holds_checkpoints(directory: Path) -> bool:
    return (
        (directory / "latest").exists()
        or any(directory.glob("global_step*"))
        or holds_weights(directory)
    )


def _is_own(config: NeoXConfig) -> bool:
    """Whether `load` is the folder that this run saves to, which its first run finds empty."""
    return (
        config.save is not None and Path(config.load or "").resolve() == Path(config.save).resolve()
    )
