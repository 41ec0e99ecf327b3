"""Configuration: NeoX YAML in, one frozen typed value out."""

from neox.config.config import NeoXConfig
from neox.config.load import Override, from_dict, load_config
from neox.config.model import ModelConfig

__all__ = ["ModelConfig", "NeoXConfig", "Override", "from_dict", "load_config"]
