"""`python -m softprompt.cli`, the same as `softprompt`."""

import sys

from softprompt.cli import main

sys.exit(main())
