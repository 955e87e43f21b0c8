"""The configuration of a run: frozen dataclasses that validate themselves, a class for each section."""

from megatron_peft.config.errors import ConfigurationError, Requirements, flag, option, require
from megatron_peft.config.methods import LINEAR_MODULES, Method, ParamGroup, PeftFormat, PeftOptions
from megatron_peft.config.model import JSON_SUFFIXES, DataConfig, ModelConfig, ParallelConfig
from megatron_peft.config.peft import METHODS, PeftConfig
from megatron_peft.config.run import RunConfig, config_from_dict, config_to_dict, field_names, missing_for_training
from megatron_peft.config.training import CheckpointConfig, LoggingConfig, OptimizerSettings, TrainingConfig

__all__ = [
    "CheckpointConfig",
    "ConfigurationError",
    "DataConfig",
    "JSON_SUFFIXES",
    "LINEAR_MODULES",
    "LoggingConfig",
    "METHODS",
    "Method",
    "ModelConfig",
    "OptimizerSettings",
    "ParallelConfig",
    "ParamGroup",
    "PeftConfig",
    "PeftFormat",
    "PeftOptions",
    "Requirements",
    "RunConfig",
    "TrainingConfig",
    "config_from_dict",
    "config_to_dict",
    "field_names",
    "flag",
    "missing_for_training",
    "option",
    "require",
]
