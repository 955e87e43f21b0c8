"""What is told about a flag that is not served: a Megatron flag is refused by name, with the reason and the way out, a
flag of Hugging Face's trainers gets what stands for it here, and any other the nearest flag.

In the tables flags are written without the leading dashes.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from megatron_peft.cli.flags import served_flags
from megatron_peft.cli.megatron import flags_of_fields

TYPO, NEAR = 0.85, 0.6  # likeness to a flag: a slip of the finger; worth asking about
MIN_BEGINNING = 6  # letters of a flag's beginning that are not there by chance
FIELD_REASON = "a field of megatron-core that fine-tuning has no use for"

# Reason -> flags, and as `moe-*` the beginnings of flags and fields that are Megatron's; the longest beginning wins.
REFUSED = {
    "mixture of experts": "expert-* moe-* num-experts num-moe-experts overlap-moe-expert-parallel-comm",
    "multi-latent attention": """
        cache-mla-latents kv-lora-rank mla-* mscale mscale-all-dim multi-latent-attention q-lora-rank qk-head-dim
        qk-pos-emb-head-dim rotary-scaling-factor v-head-dim""",
    "multi-token prediction": "freeze-base-for-mtp mtp-* qad-train-target",
    "FP8": "first-last-layers-bf16 fp8* keep-fp8-transpose-cache-when-using-custom-fsdp te-precision-config-file",
    "float16": """
        fp16 fp16-lm-cross-entropy hysteresis initial-loss-scale loss-scale loss-scale-window min-loss-scale
        no-log-loss-scale-to-tensorboard""",
    "CUDA graphs": """
        cuda-graph-* enable-cuda-graph external-cuda-graph optimizer-cuda-graph te-rng-tracker use-te-rng-tracker""",
    "fully sharded data parallelism": """
        create-all-gather-group data-parallel-sharding-strategy enable-full-sharding-in-hsdp fsdp-*
        init-model-with-meta-device megatron-fsdp-* no-strict-fsdp-dtensor-load outer-dp-sharding-strategy
        torch-fsdp2-* use-custom-fsdp use-megatron-fsdp use-torch-fsdp2""",
    "NCCL tuning": "high-priority-stream-groups nccl-* sharp-enabled-group use-nccl-ub use-sharp",
    "layouts of ranks": """
        disable-gloo-process-groups fake-process-group lazy-mpu-init local-rank local_rank model-parallel-size
        no-scatter-gather-tensors-in-pipeline num-virtual-stages-per-pipeline-rank
        pipeline-model-parallel-split-rank standalone-embedding-stage use-gloo-process-groups use-tp-pp-dp-mapping""",
    "tuning of the data-parallel reduction": """
        ddp-average-in-collective ddp-bucket-size ddp-num-buckets ddp-pad-buckets-for-high-nccl-busbw
        ddp-param-name-patterns-for-fp32-local-accumulation ddp-reduce-scatter-with-fp32-accumulation
        delay-param-gather no-align-grad-reduce no-delay-grad-reduce no-use-layer-wise-param-layout
        num-distributed-optimizer-instances train-sync-interval""",
    "BERT, T5, vision and retrieval models": """
        block-data-path classes-fraction data-per-class-fraction decoder-num-layers decoder-seq-length
        embedding-path evidence-data-path head-lr-mult img-h img-w iter-per-epoch mask-factor mask-prob mask-type
        no-data-sharding num-channels num-classes onnx-safe output-bert-embeddings patch-dim query-in-block-prob
        sample-rate short-seq-prob titles-data-path use-one-sent-docs vocab-extra-ids""",
    "model parts that no supported family has": """
        activation-func-clamp-value apply-residual-connection-post-layernorm attention-output-gate enable-gpt-oss
        glu-linear-offset mrope-section no-rope-freq output-logit-dtype qk-clip qk-l2-norm quick-geglu rope-type
        rotary-interleaved rotary-seq-len-interpolation-factor softmax-scale softmax-type spec squared-relu
        window-attn-skip-freq window-size""",
    "weights come from the pretrained checkpoint": """
        data-parallel-random-init embedding-init-method-std init-method-xavier-uniform no-pad-vocab-size
        padded-vocab-size""",
    "the choice of kernels is made by torch or Transformer Engine": """
        disable-jit-fuser no-bias-gelu-fusion no-persist-layer-norm use-flashinfer-fused-rope use-te-activation-func""",
    "legacy models and old names of Megatron-LM": """
        batch-size checkpoint-activations enable-experimental legacy-tokenizer lr-decay-steps lr-warmup-steps
        use-legacy-models warmup wd-incr-steps wsd-decay-steps yaml-cfg""",
    "batch sizes that change during a run": "decrease-batch-size-if-needed rampup-batch-size step-batch-size-schedule",
    "freezing by hand": "freeze-all-layers no-weight-decay-cond-type",
    "validation in other ways than --eval-iters": """
        eval-global-batch-size eval-micro-batch-size full-validation multiple-validation-sets skip-train
        start-eval-at-iter test-mode validation-set-names""",
    "data is read in other ways": """
        allow-ambiguous-pad-tokens data-args-path dataloader-defer-npy-index-mmap dataloader-fast-cache-load
        dataloader-inter-document-masking dataloader-type eod-mask-loss finetune-data-files finetune-data-split
        finetune-hf-dataset mid-level-dataset-surplus num-dataset-builder-threads object-storage-cache-path
        per-dataset-sequences-path per-split-data-args-path phase-transition-iterations renormalize-blend-weights
        reset-attention-mask reset-position-ids s3-cache-path sft sft-tokenizer-prompt-format""",
    "tokenizers other than Hugging Face's and SentencePiece's": """
        merge-file metadata-path no-tokenizer-sentencepiece-ignore-extra-whitespaces null-tokenizer-eod-id
        null-tokenizer-pad-id special-tokens tokenizer-hf-include-special-tokens
        tokenizer-hf-no-include-special-tokens tokenizer-hf-no-use-fast tokenizer-hf-use-fast tokenizer-metadata
        tokenizer-sentencepiece-legacy tokenizer-special-tokens trust-remote-code use-gigatoken vocab-file""",
    "checkpoints are in a format of our own": """
        async-ckpt-cpu-priority async-ckpt-io-priority async-ckpt-use-cpu-shm async-strategy auto-detect-ckpt-format
        ckpt-assume-constant-structure ckpt-convert-format ckpt-convert-save
        ckpt-convert-update-legacy-dist-opt-format ckpt-drop-redundant-extra-state ckpt-fully-parallel-load
        ckpt-fully-parallel-load-exchange-algo ckpt-fully-parallel-load-per-rank-objects
        ckpt-fully-parallel-load-process-group ckpt-fully-parallel-save ckpt-fully-parallel-save-process-group
        ckpt-pg-tensors-cache-create ckpt-pg-tensors-cache-path ckpt-step dist-ckpt-format
        dist-ckpt-optim-fully-reshardable dist-ckpt-save-pre-mcore-014 dist-ckpt-strictness dist-ckpt-workers
        distrib-optim-fully-reshardable-mem-efficient fully-parallel-load fully-parallel-save
        load-main-params-from-ckpt load-model-opt-format most-recent-k no-ckpt-fully-parallel-save
        no-ckpt-load-validate-sharding-integrity no-save-tokenizer-assets no-stream-ckpt-dequant
        override-ckpt-iteration persistent-save-interval replication replication-factor replication-jump
        save-activations-interval save-config-filepath save-dgrads-interval save-params-interval
        save-retain-interval save-tokens-per-expert-interval save-wgrads-interval use-mp-args-from-checkpoint-args
        use-persistent-ckpt-worker verify-integrity""",
    "the log is metrics.jsonl, TensorBoard and Weights & Biases": """
        log-batch-size-to-tensorboard log-device-memory-used log-l2-norm-grad-to-tensorboard log-max-attention-logit
        log-memory-interval log-memory-to-tensorboard log-num-zeros-in-grad log-params-norm log-progress
        log-runtime-to-tensorboard log-throughput-to-tensorboard log-timers-to-tensorboard
        log-validation-ppl-to-tensorboard log-world-size-to-tensorboard logging-level memory-keys modules-to-filter
        no-filter-warnings no-log-learnig-rate-to-tensorboard runtime-time-unit set-level-for-all-loggers
        tensorboard-log-interval tensorboard-queue-size throughput-window-size timing-log-option wandb-entity""",
    "profiling": """
        no-barrier-with-level-1-timing nvtx-ranges profile-* pytorch-profiler-* record-shapes use-nsys-profiler""",
    "inference server": """
        decode-only-cuda-graphs disable-chunked-prefill enable-chunked-prefill flash-decode inference-*
        max-batch-size max-tokens-to-oom mlp-chunks-for-prefill no-offset-sampling-seed-by-dp-rank
        num-speculative-tokens num-tokens-to-generate prompts return-log-probs skip-prompt-log-probs
        use-legacy-static-engine use-same-sampling-seed-across-dp-ranks""",
    "reinforcement learning": "grpo-* langrl-* perform-rl-step refit-method result-rejected-tracker-filename rl-*",
    "quantization and distillation": "export-* modelopt-enabled teacher-model-config",
    "watching and repairing a run": """
        calc-ft-timeouts check-for-large-grads check-for-spiky-loss check-weight-hash-across-dp-replicas-interval
        disable-straggler-on-startup dump-param-to-param-group-map enable-ft-package error-injection-rate
        error-injection-type exit-signal exit-signal-handler-for-dataloader exit-signal-handler-for-training
        gpu-sniff-test-interval iterations-to-skip no-check-for-nan-in-loss rerun-mode run-workload-inspector-server""",
    "the multi-storage client": "disable-msc enable-msc",
    "NVIDIA's own cluster": "adlr-*",
    "NVIDIA's own logging service": "app-tag-* one-logger-*",
    "BERT": "bert-*",
    "retrieval": "biencoder-* ict-* indexer-* retriever-*",
    "context parallelism": "context-parallel-* cp-* hierarchical-context-parallel-* hybrid-context-parallel*",
    "offloading to the CPU": "cpu-offloading*",
    "vision": "dino-* swin-* vision-*",
    "communication overlap inside Transformer Engine's linear layers": "disable-tp-comm-* tp-comm-*",
    "experimental attention": "dsa-*",
    "encoder-decoder models": "encoder-*",
    "fill-in-the-middle data": "fim-*",
    "NCCL's flight recorder": "flight-recorder-*",
    "FP4": "fp4*",
    "NVIDIA's fault-tolerance package": "ft-*",
    "generalized tensor parallelism": "gtp-*",
    "heterogeneous layers": "heterogeneous-*",
    "hybrid Mamba models": "hybrid-attention-* hybrid-layer-* hybrid-mlp-* hybrid-override-*",
    "restarts inside a process": "inprocess-*",
    "quantization": "kitchen-* use-kitchen*",
    "linear attention": "linear-*",
    "the Lion optimizer": "lion-*",
    "distillation": "logits-*",
    "Mamba": "mamba-* use-mamba-*",
    "the Muon optimizer": "muon-*",
    "non-persistent checkpoints": "non-persistent-*",
    "OpenTelemetry": "otel-*",
    "relative position embeddings": "relative-attention-*",
    "Retro": "retro-*",
    "straggler detection": "straggler-*",
    "tiktoken tokenizers": "tiktoken-*",
    "YaRN rope scaling": "yarn-*",
}

REASONS: Mapping[str, str] = {name: reason for reason, names in REFUSED.items() for name in names.split()}

# Flag -> what to do, where that is not simply to leave it out.
WAYS_OUT = {
    "batch-size": "use --micro-batch-size",
    "check-for-nan-in-grad": "gradients are checked unless --no-check-for-nan-in-loss-and-grad is given",
    "checkpoint-activations": "use --recompute-activations",
    "fp16": "use --bf16",
    "max-batch-size": "answers come from megatron-peft generate, with --batch-size",
    "num-tokens-to-generate": "answers come from megatron-peft generate, with --max-new-tokens",
    "prompts": "answers come from megatron-peft generate, with --prompt",
    "freeze-all-layers": "use --peft-method",
    "full-validation": "leave --eval-iters out: the whole validation set is then used",
    "local-rank": "start it with torchrun",
    "local_rank": "start it with torchrun",
    "model-parallel-size": "use --tensor-model-parallel-size",
    "most-recent-k": "use --keep-last-checkpoints",
    "standalone-embedding-stage": "use --account-for-embedding-in-pipeline-split",
    "num-layers-in-first-pipeline-stage": "use --decoder-first-pipeline-num-layers",
    "num-layers-in-last-pipeline-stage": "use --decoder-last-pipeline-num-layers",
    "num-virtual-stages-per-pipeline-rank": "use --num-layers-per-virtual-pipeline-stage",
    "persistent-save-interval": "use --save-interval",
    "virtual-pipeline-model-parallel-size": "use --num-layers-per-virtual-pipeline-stage",
    "warmup": "use --lr-warmup-fraction",
}
# Reason -> what to do, for all flags of that reason.
WAYS_OUT_OF_REASONS = {
    "FP4": "remove it; --bf16 trains in bfloat16",
    "FP8": "remove it; --bf16 trains in bfloat16",
    "context parallelism": (
        "remove it; --sequence-parallel with --tensor-model-parallel-size, and --recompute-granularity, make room for "
        "long samples"
    ),
    "fully sharded data parallelism": (
        "remove it; --use-distributed-optimizer shards the optimizer's state, --tensor-model-parallel-size the model"
    ),
}
# Flag -> what to do about a value that is not among its choices.
WAYS_OUT_OF_VALUES = {
    "--ckpt-format": "a run's checkpoints have one format, and megatron-peft convert converts them",
    "--context-parallel-size": WAYS_OUT_OF_REASONS["context parallelism"],
    "--expert-model-parallel-size": "remove it; mixtures of experts are not supported",
    "--expert-tensor-parallel-size": "remove it; mixtures of experts are not supported",
    "--tokenizer-type": "use HuggingFaceTokenizer with a folder that has the tokenizer.json of the model",
    "--transformer-impl": "use auto",
}

# Flags of Hugging Face's trainers (transformers, TRL, PEFT). People who come from there type them, with underscores or
# dashes; the nearest flag by its letters would mislead.

# What stands for them here -> their flags, without leading dashes and with dashes inside.
_EQUIVALENTS = {
    "--pretrained-checkpoint": "model-name-or-path model-name base-model model-id",
    "--tokenizer-model": "tokenizer-name tokenizer-name-or-path",
    "--save; a new run never writes into another run's folder": "output-dir overwrite-output-dir",
    "--lr": "learning-rate",
    "--train-epochs": "num-train-epochs num-epochs epochs",
    "--train-iters": "max-steps",
    "--micro-batch-size": "per-device-train-batch-size per-gpu-train-batch-size train-batch-size",
    "--micro-batch-size, for validation too": "per-device-eval-batch-size eval-batch-size",
    "--global-batch-size: --micro-batch-size x data-parallel ranks x accumulation steps": "gradient-accumulation-steps",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1": "gradient-checkpointing",
    "--keep-last-checkpoints": "save-total-limit",
    "--save-interval, in iterations": "save-steps save-strategy",
    "--eval-interval, in iterations": "eval-steps eval-strategy evaluation-strategy",
    "--valid-data-path": "validation-file validation-data do-eval eval-dataset",
    "--train-data-path": "train-file dataset dataset-name dataset-path data-files training-data",
    "--log-interval, in iterations": "logging-steps logging-strategy",
    "--tensorboard-dir and --wandb-project": "report-to logging-dir",
    "--wandb-exp-name": "run-name",
    "--load, with the folder of --save": "resume-from-checkpoint",
    "--lr-warmup-iters": "warmup-steps",
    "--lr-warmup-fraction": "warmup-ratio",
    "--lr-decay-style": "lr-scheduler-type",
    "--clip-grad": "max-grad-norm",
    "--adam-eps": "adam-epsilon",
    "--optimizer": "optim",
    "--seq-length": "max-seq-length max-seq-len max-length model-max-length cutoff-len block-size",
    "--pack-sequences": "sample-packing",
    "--num-workers": "dataloader-num-workers preprocessing-num-workers",
    "--bf16": "torch-dtype dtype half-precision mixed-precision",
    "--attention-backend": "attn-implementation use-flash-attention-2 use-flash-attention flash-attn",
    "--distributed-timeout-minutes": "ddp-timeout",
    "--use-distributed-optimizer, which shards the optimizer's state, and --tensor-model-parallel-size": (
        "deepspeed fsdp fsdp-config zero-stage"
    ),
    "--nproc-per-node, with --tensor-model-parallel-size and --pipeline-model-parallel-size": (
        "device-map num-gpus num-processes"
    ),
    "--peft-method": "use-peft peft-type use-lora finetuning-type",
    "--peft-method lora-ga, with --lora-ga-init": "init-lora-weights",
    "--lora-rank": "lora-r r rank",
    "--lora-rs": "use-rslora",
    "--lora-plus-ratio": "loraplus-lr-ratio",
    "--peft-target-modules": "lora-target-modules target-modules lora-target",
    "--boft-factors": "boft-n-butterfly-factor",
    "--rotation-side": "coft",
    "megatron-peft convert export-adapter, after the run": "push-to-hub hub-model-id",
    "megatron-peft convert merge, after the run": "merge-lora merge-and-unload merge-weights",
    # What has no equivalent, and what serves the same end.
    "not supported: the base is in float32 or, with --bf16, in bfloat16. To save memory, use --recompute-granularity, "
    "--tensor-model-parallel-size or --use-distributed-optimizer": (
        "load-in-4bit load-in-8bit bits bnb-4bit-compute-dtype bnb-4bit-quant-type use-bnb-nested-quant "
        "quantization-bit quantization-config use-4bit use-8bit"
    ),
    "always the case, so leave it out": (
        "do-train completion-only-loss assistant-only-loss train-on-completions remove-unused-columns "
        "ddp-find-unused-parameters gradient-checkpointing-kwargs local-files-only"
    ),
    "never the case, so leave it out: loss is counted on completions only": "train-on-inputs",
}
EQUIVALENTS: Mapping[str, str] = {name: here for here, names in _EQUIVALENTS.items() for name in names.split()}


def known_flags() -> dict[str, str | None]:
    """Every flag that is known, with its dashes -> None if it is served, else why it is not.

    Besides Megatron-LM's own flags these are all fields of megatron-core's configuration classes, whatever its
    version: a field is served by a flag of `served_flags`, or it is refused; there is no third state.
    """
    of_fields = {
        name: reason_of(name[2:]) or reason_of(field_name.replace("_", "-")) or FIELD_REASON
        for name, field_name in flags_of_fields()
    }
    refused = {f"--{name}": reason for name, reason in refused_flags().items()}
    return of_fields | refused | {name: None for served in served_flags() for name in served.names}


def why_not_served(name: str) -> str:
    """The error message for a Megatron flag that is not supported, another library's flag, or an unknown one."""
    known = known_flags()
    if reason := known.get(name):
        return refusal(name, reason)
    if told := equivalent(name):
        return told
    served = [other for other, reason in known.items() if reason is None]
    bare = name.lstrip("-")
    family = reason_of(bare) or reason_of(bare.removeprefix("no-"))
    if family and not nearest(name, served, TYPO):
        return refusal(name, family)
    like = nearest(name, known, TYPO) or nearest(name, [*served, *EQUIVALENTS], NEAR)
    if not like:
        return f"{name} is not a known flag; --help lists them."
    if told := equivalent(like):  # a slip in another library's flag
        return f"{name} is not a known flag; {told}"
    not_served = "" if known[like] is None else ", a Megatron flag that is not supported"
    return f"{name} is not a known flag; did you mean {like}{not_served}?"


def nearest(name: str, others: Iterable[str], likeness: float) -> str | None:
    """The only flag that begins with `name`, or else the one most like it, if it is at least so alike (0 to 1).

    Dashes in front do not count.
    """
    bare, flags = name.lstrip("-"), [other.lstrip("-") for other in others]
    longer = [flag for flag in flags if len(bare) >= MIN_BEGINNING and flag.startswith(f"{bare}-")]
    near = longer if len(longer) == 1 else get_close_matches(bare, flags, 1, likeness)
    return f"--{near[0]}" if near else None


def equivalent(flag: str) -> str | None:
    """What to tell about a flag (with its dashes) of Hugging Face's trainers; None if it is not one."""
    here = EQUIVALENTS.get(flag.lstrip("-").replace("_", "-"))
    return f"{flag} is a flag of Hugging Face's libraries; here it is {here}." if here else None


def refused_flags() -> dict[str, str]:
    """Flag of Megatron-LM without dashes -> reason, without those that only a beginning or a field makes known."""
    return {name: reason for name, reason in REASONS.items() if not name.endswith("*")}


def reason_of(name: str) -> str | None:
    """Why Megatron-LM's flag `name` (no leading dashes) is not served; None if it is not known here."""
    beginnings = [start for start in REASONS if start.endswith("*") and name.startswith(start[:-1])]
    return REASONS.get(name) or (REASONS[max(beginnings, key=len)] if beginnings else None)


def refusal(flag: str, reason: str) -> str:
    """The error message for an unsupported Megatron flag, given with its dashes."""
    way_out = WAYS_OUT.get(flag.lstrip("-")) or WAYS_OUT_OF_REASONS.get(reason, "remove it")
    return f"{flag} is a Megatron flag that megatron_peft does not support ({reason}); {way_out}."
