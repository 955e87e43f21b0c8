"""The commands of `megatron-peft`, a file each; tools/*.py and pretrain_peft.py are the same commands as scripts."""
