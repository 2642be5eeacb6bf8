"""The program `mae` with little memory: `python limited.py MIB RANK COMMAND ...`.

So many MiB of address space beyond what Python and its libraries take, for this rank alone.
"""

import os
import resource
import sys

from mae import commands
from mae.cli import main
from mae.memory import status

assert commands

if __name__ == "__main__":
    limit = resource.RLIM_INFINITY  # rank 0 would pass its own on
    if os.environ.get("LOCAL_RANK", "0") == sys.argv[2]:
        limit = status("VmSize") + int(sys.argv[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    sys.exit(main(sys.argv[3:]))
