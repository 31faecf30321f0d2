"""Subgroups of the default process group, each made once per process. No other file makes groups."""

import datetime
import weakref
from collections.abc import Sequence

import torch.distributed as dist

# A cache, because torch keeps a group until it is destroyed. Weak, because a group's threads end with the last
# reference to it, and a group that outlives the interpreter can abort the process.
_made: weakref.WeakValueDictionary[tuple, dist.ProcessGroup] = weakref.WeakValueDictionary()


def subgroup(
    ranks: Sequence[int], *, backend: str | None = None, timeout: datetime.timedelta | None = None, name: str = ""
) -> dist.ProcessGroup:
    """Return the group of these ranks of the default group. All of them call it, in the same order for several groups.

    Groups of the same ranks with different names are independent.
    """
    world = dist.group.WORLD
    key = (world.group_name, tuple(ranks), backend, timeout, name)
    # A new default group can have the name of one that was destroyed.
    group = _made.get(key)
    if group is None or group not in dist.distributed_c10d._world.pg_map:
        group = dist.new_group(list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True)
        _made[key] = group
    return group
