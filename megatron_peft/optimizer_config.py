"""The optimizer of a run and its learning rate."""

from dataclasses import dataclass
from typing import Literal

from megatron_peft.config.errors import Requirements, flag


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW or SGD, its learning-rate schedule and its sharding. Units: rates per step, decay per unit of rate."""

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-4
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    lr_decay_iters: int | None = None
    lr_decay_samples: int | None = None
    lr_warmup_iters: int = 0
    lr_warmup_samples: int = 0
    lr_warmup_fraction: float | None = None
    lr_warmup_init: float = 0.0
    lr_wsd_decay_iters: int | None = None
    lr_wsd_decay_samples: int | None = None
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    weight_decay: float = 0.01
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.9
    clip_grad: float = 1.0
    use_distributed_optimizer: bool = False
    overlap_param_gather: bool = False
    override_opt_param_scheduler: bool = False
    use_checkpoint_opt_param_scheduler: bool = False

    def __post_init__(self) -> None:
        wsd_flags = [n for n in ("lr_wsd_decay_iters", "lr_wsd_decay_samples") if getattr(self, n) is not None]
        start, end = self.start_weight_decay, self.end_weight_decay
        with Requirements(self) as require:
            require.positive("lr", "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples")
            require.positive("adam_eps")
            require.not_negative("min_lr", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_init", "weight_decay")
            require.not_negative("start_weight_decay", "clip_grad")
            require.fraction("adam_beta1", "adam_beta2", "sgd_momentum")
            require(self.min_lr <= self.lr, f"--min-lr {self.min_lr} is above --lr {self.lr}.")
            require(self.lr_warmup_init <= self.lr, f"--lr-warmup-init {self.lr_warmup_init} is above --lr {self.lr}.")
            require(
                self.lr_warmup_fraction is None or not (self.lr_warmup_iters or self.lr_warmup_samples),
                "--lr-warmup-fraction excludes --lr-warmup-iters and --lr-warmup-samples: give one.",
            )
            require(
                self.lr_warmup_fraction is None or 0 <= self.lr_warmup_fraction < 1,
                f"--lr-warmup-fraction is {self.lr_warmup_fraction}; it is a part of the decay: at least 0, below 1.",
            )
            require(
                self.lr_decay_style != "WSD" or len(wsd_flags) == 1,
                "--lr-decay-style WSD needs the length of its last phase: give --lr-wsd-decay-iters (or, with "
                "--train-samples, --lr-wsd-decay-samples).",
            )
            require(
                self.lr_decay_style == "WSD" or not wsd_flags,
                f"{', '.join(map(flag, wsd_flags))} belong to --lr-decay-style WSD, but it is {self.lr_decay_style}.",
            )
            constant = self.weight_decay_incr_style == "constant"
            require(
                not constant or start is end is None,
                "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear or cosine.",
            )
            require(
                constant or (start is not None and end is not None and start <= end),
                f"--weight-decay-incr-style {self.weight_decay_incr_style} needs --start-weight-decay at most "
                f"--end-weight-decay (given: {start} and {end}).",
            )
            require.needs("overlap_param_gather", "use_distributed_optimizer")
            require(
                not self.use_distributed_optimizer or self.optimizer == "adam",
                f"--use-distributed-optimizer shards Adam only: leave it out with --optimizer {self.optimizer}.",
            )
            require.at_most_one("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
