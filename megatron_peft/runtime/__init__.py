import warnings

# Both are optional here; megatron-core would say so three times on every rank.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
