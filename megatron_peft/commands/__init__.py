"""The commands of `megatron-peft`, one file each. tools/*.py and pretrain_peft.py are the same commands as scripts."""
