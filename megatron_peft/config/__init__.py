"""The configuration of a run: frozen dataclasses that validate themselves, a class for each section."""

from megatron_peft.config.errors import (
    Checked,
    ConfigurationError,
    Requirements,
    flag,
    mistyped,
    not_obeyed,
    option,
    print_failure,
    require,
    require_packages,
    required_option,
    writing,
)
from megatron_peft.config.methods import (
    LINEAR_MODULES,
    METHODS,
    LinearSizes,
    Method,
    ParamGroup,
    PeftConfig,
    PeftFormat,
    PeftOptions,
    Side,
    is_targeted,
    require_matches,
)
from megatron_peft.config.model import SENTENCEPIECE, DataConfig, ModelConfig
from megatron_peft.config.run import SECTIONS, RunConfig, config_from_dict, config_to_dict, field_names, make_run
from megatron_peft.config.sources import Blend, is_indexed, kind_of_source, parse_blend
from megatron_peft.config.training import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerSettings,
    ParallelConfig,
    TrainingConfig,
    missing_for_training,
)
