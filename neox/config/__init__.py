"""Configuration: NeoX YAML in, one frozen typed value out."""

from neox.config.config import NeoXConfig
from neox.config.deepspeed import to_deepspeed
from neox.config.draft import Problem
from neox.config.files import check_files
from neox.config.grid import Devices
from neox.config.load import Override, change, from_dict, load_config, parse_set
from neox.config.model import ModelConfig

__all__ = [
    "Devices",
    "ModelConfig",
    "NeoXConfig",
    "Override",
    "Problem",
    "change",
    "check_files",
    "from_dict",
    "load_config",
    "parse_set",
    "to_deepspeed",
]
