"""`megatron-peft certify`, as a script."""

import sys

from megatron_peft.commands.certify import main

if __name__ == "__main__":
    sys.exit(main())
