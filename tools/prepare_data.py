"""`megatron-peft data prepare`, as a script."""

import sys

from megatron_peft.commands.data import prepare_data as main

if __name__ == "__main__":
    sys.exit(main())
