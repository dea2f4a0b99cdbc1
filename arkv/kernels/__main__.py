"""``python -m arkv.kernels``: build the CPU kernel for this machine."""

import sys

from arkv.kernels.native import NotBuilt, build

try:
    sys.stdout.write(f"CPU kernel: {build()}\n")
except NotBuilt as error:
    sys.exit(f"CPU kernel: not built: {error}")
