"""`python -m hero`, as `torchrun -m hero` and `accelerate launch -m hero` start it."""

import sys

from hero.cli import main

sys.exit(main())
