"""`python -m hero`, as `torchrun -m hero` and `accelerate launch -m hero` start it."""

import os
import sys

if sys.path[0] == os.getcwd():  # Python puts it first; a jinja2.py there is not ours to run
    sys.path.append(sys.path.pop(0))

from hero.cli import main

sys.exit(main())
