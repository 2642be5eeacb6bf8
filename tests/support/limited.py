"""The program `mae` with little memory: `python limited.py MIB RANK COMMAND ...`.

So many MiB of address space beyond what Python and its libraries take, for this rank alone.
"""

import os
import resource
import sys

from mae.cli import COMMANDS, command_function, main
from mae.runtime.memory import status

if __name__ == "__main__":
    for name in COMMANDS:
        command_function(name)  # imported before memory is short
    limit = resource.RLIM_INFINITY  # rank 0 would pass its own on
    if os.environ.get("LOCAL_RANK", "0") == sys.argv[2]:
        limit = status("VmSize") + int(sys.argv[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    sys.exit(main(sys.argv[3:]))
