"""The name "neox" among lm-eval's models, for its own command line.

lm-eval looks for models in its own package only. So `make install` (tools/register_lm_eval.py) puts
a line into the environment's site-packages that calls `register_when_imported` when Python starts.
That costs nothing until lm-eval is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TARGET = "neox.evaluation.harness:NeoXHarness"
_MODELS = "lm_eval.models"


class _Finder(importlib.abc.MetaPathFinder):
    """Stands in the way of one import: it lets others find the module, and adds our model to it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODELS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make the name known. lm-eval has been imported."""
    from lm_eval.api.registry import model_registry

    if "neox" not in model_registry:
        model_registry.register("neox", target=TARGET)


def register_when_imported() -> None:
    if _MODELS in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
