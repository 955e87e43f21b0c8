"""`megatron-peft data preprocess`, as a script."""

import sys

from megatron_peft.commands.data import preprocess_data as main

if __name__ == "__main__":
    sys.exit(main())
