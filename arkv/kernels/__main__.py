"""``python -m arkv.kernels``: build the CPU kernels for this machine."""

import sys

from arkv.kernels.cpu.building import NotBuilt, build

try:
    sys.stdout.write(f"CPU kernels: {build()}\n")
except NotBuilt as error:
    sys.exit(f"CPU kernels: not built: {error}")
