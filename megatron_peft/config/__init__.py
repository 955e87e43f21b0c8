"""The configuration of a run: frozen dataclasses that validate themselves, a class for each section."""

from megatron_peft.config.errors import ConfigurationError, Requirements, flag, require, require_packages
from megatron_peft.config.model import JSON_SUFFIXES, DataConfig, ModelConfig, ParallelConfig
from megatron_peft.config.peft import LINEAR_MODULES, PEFT_METHODS, PeftConfig
from megatron_peft.config.run import RunConfig, config_from_dict, config_to_dict, field_names, missing_for_training
from megatron_peft.config.training import CheckpointConfig, LoggingConfig, OptimizerSettings, TrainingConfig

__all__ = [
    "CheckpointConfig",
    "ConfigurationError",
    "DataConfig",
    "JSON_SUFFIXES",
    "LINEAR_MODULES",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerSettings",
    "PEFT_METHODS",
    "ParallelConfig",
    "PeftConfig",
    "Requirements",
    "RunConfig",
    "TrainingConfig",
    "config_from_dict",
    "config_to_dict",
    "field_names",
    "flag",
    "missing_for_training",
    "require",
    "require_packages",
]
