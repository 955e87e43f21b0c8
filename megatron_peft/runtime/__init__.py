import warnings

# megatron-core's warnings on every rank about optional packages and its own defaults.
for message in ("Transformer Engine and Apex are not installed", "Apex is not installed", "full scope is deprecated"):
    warnings.filterwarnings("ignore", message=message)
