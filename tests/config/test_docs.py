"""docs/configuration.md is what tools/config_docs.py writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from neox.config import NeoXConfig
from neox.config.fields import keys_of

REPOSITORY = Path(__file__).parents[2]


def load_tool() -> ModuleType:
    path = REPOSITORY / "tools" / "config_docs.py"
    spec = importlib.util.spec_from_file_location("config_docs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date() -> None:
    written = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == load_tool().page(), "run python tools/config_docs.py"


def test_the_page_names_every_key() -> None:
    page = load_tool().page()
    for name in keys_of(NeoXConfig):
        assert f"| `{name}` |" in page, name
    assert "### optimizer.params of adam, cpu_adam and cpu_torch_adam" in page
    assert "### zero_optimization.offload_optimizer" in page
