import megatron_peft.runtime  # before megatron-core, whose warnings about optional packages it silences
