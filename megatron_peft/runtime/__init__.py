import warnings

# What megatron-core says of optional packages and of its own defaults, on every rank, concerns no user of this one.
for message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
):
    warnings.filterwarnings("ignore", message=message)
