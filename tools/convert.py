"""`megatron-peft convert`, as a script."""

import sys

from megatron_peft.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
