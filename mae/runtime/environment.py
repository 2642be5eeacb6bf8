"""The rank of this process by the environment variables of its launcher, before torch or Lightning are loaded."""

import os

# As Lightning reads them: torchrun, Lightning's own launcher, Slurm, LSF.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def environment_rank() -> int:
    """The rank that the launcher gave this process; 0 without a launcher. Under Lightning's it is the local rank."""
    for key in RANK_VARIABLES:
        if (value := os.environ.get(key, "")).isdecimal():
            return int(value)
    return 0


def is_first_rank() -> bool:
    """Whether this is the first of all processes of the run."""
    return environment_rank() == 0 and os.environ.get("NODE_RANK", "0") == "0"


def torchrun_sizes() -> dict[str, int]:
    """The number of nodes and devices under torchrun, which with `--nnodes 1:2` may change from start to start."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {}
    return {"num_nodes": int(os.environ["GROUP_WORLD_SIZE"]), "devices": int(os.environ["LOCAL_WORLD_SIZE"])}
