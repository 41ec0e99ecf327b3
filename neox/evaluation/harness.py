"""Our models from lm-eval's own command line:

    lm_eval --model neox --model_args config=configs/pythia/70M.yml,load=/data/70M --tasks piqa

`config` is one configuration file, or several joined by "+"; every other argument is a key of the
configuration. neox.evaluation.registration makes the name known to lm-eval.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval.utils import simple_parse_args_string

from neox import log
from neox.config import Devices, NeoXConfig, Override, load_config
from neox.errors import ConfigError, NeoXError
from neox.evaluation.adapter import NeoXLM
from neox.inference.load import load_model, open_checkpoint
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import build_tokenizer
from neox.tokenizer.chat import load_chat_template

_ORIGIN = "--model_args"


class NeoXHarness(NeoXLM):
    """One process's model, as `lm_eval --model neox` makes it.

    batch_size, device: lm-eval's. A batch size of 1, which lm-eval takes by default, and "auto" are
    as many inputs as are fast; scores do not depend on it.
    Raises NeoXError for what is wrong with the configuration or the checkpoint.
    """

    def __init__(
        self,
        config: str | None = None,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **values: Any,
    ) -> None:
        if config is None:
            raise ConfigError(f"{_ORIGIN}: name a configuration file, config=FILE.yml")
        overrides = {key: Override(value, _ORIGIN) for key, value in values.items()}
        settings = load_config(
            [Path(file) for file in config.split("+")],
            overrides,
            purpose="evaluate",
            world_size=lambda _: Devices(slots=(1,)),
        )
        groups = ProcessGroups.single(_device(device))
        checkpoint = open_checkpoint(settings, groups)
        tokenizer = build_tokenizer(settings)
        super().__init__(
            lambda: load_model(settings, groups, checkpoint, tokenizer.vocab_size),
            tokenizer,
            groups,
            settings.seq_length,
            batch_size=_batch_size(batch_size),
            seed=settings.seed,
        )
        if settings.chat_template_path is not None:
            self.chat = load_chat_template(settings.chat_template_path)
        self._settings = settings

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> NeoXHarness:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> NeoXHarness:
        """What lm-eval's command line calls: an error is a line, and status 2."""
        given = {
            key: value for key, value in (additional_config or {}).items() if value is not None
        }
        try:
            return cls(**arg_dict, **given)
        except NeoXError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to its results' `config`."""
        settings: NeoXConfig = self._settings
        return {"load": settings.load, "iteration": settings.iteration, "precision": settings.dtype}


def _device(given: str | None) -> torch.device:
    """lm-eval asks for cuda:0 unless it is told otherwise, also where there is none."""
    if not torch.cuda.is_available() and (given is None or given.startswith("cuda")):
        return torch.device("cpu")
    return torch.device(given or "cuda")


def _batch_size(given: int | str | None) -> int | None:
    if given is None or str(given).startswith("auto"):
        return None
    try:
        size = int(given)
    except ValueError:
        raise ConfigError(f"--batch_size is {given!r}: give a number or auto") from None
    if size < 1:
        raise ConfigError(f"--batch_size is {size}: give 1 or more, or auto")
    return size if size > 1 else None


log.quiet_third_parties()
