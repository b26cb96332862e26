"""`python -m peft_vlm.cli`."""

import sys

from peft_vlm.cli.program import main

sys.exit(main())
