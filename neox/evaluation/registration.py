"""The name "neox" among lm-eval's models, for its own command line.

lm-eval looks for models in its own package only. So `make install` (tools/register_lm_eval.py) puts
a line into the environment's site-packages that runs this file when Python starts. It imports
nothing of neox, since another checkout may be what is about to run; it waits for lm-eval.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

AT_START = "neox_registration"  # what this file is called when it runs at Python's start
TARGET = "neox.evaluation.harness:NeoXHarness"
_MODELS = "lm_eval.models"
_CHECKOUT = __file__.rsplit("/neox/", 1)[0]


class _Finder:
    """Stands in the way of one import: it lets others find the module, and adds our model to it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODELS:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make the name known, and neox importable. lm-eval has been imported."""
    from lm_eval.api.registry import model_registry

    if importlib.util.find_spec("neox") is None:
        sys.path.append(_CHECKOUT)
    if "neox" not in model_registry:
        model_registry.register("neox", target=TARGET)


def register_when_imported() -> None:
    if _MODELS in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]


if __name__ == AT_START:
    register_when_imported()
