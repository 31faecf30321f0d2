"""Groups inside of a process group that is given to us. The only place that makes any, each once in a process."""

import datetime
import weakref
from collections.abc import Sequence

import torch.distributed as dist

# torch keeps groups until they are destroyed, so a second one of the same ranks would only cost. Weak: a group's
# threads end with the last reference to it, and one that outlives the interpreter can abort the process.
_made: weakref.WeakValueDictionary[tuple, dist.ProcessGroup] = weakref.WeakValueDictionary()


def subgroup(
    ranks: Sequence[int], *, backend: str | None = None, timeout: datetime.timedelta | None = None, name: str = ""
) -> dist.ProcessGroup:
    """The group of these ranks. All of them must ask for it, in the same order if for several; the others need not.

    Args:
        ranks (`Sequence[int]`): Ranks of the default group, in ascending order, this process among them.
        backend (`str`, *optional*): By default that of the default group.
        timeout (`timedelta`, *optional*): Of what runs over the group, by default the backend's.
        name (`str`, *optional*): What it is for: groups of other names run beside one another.
    """
    world = dist.group.WORLD
    key = (world.group_name, tuple(ranks), backend, timeout, name)
    # A group of a default group that was destroyed since, and whose name came again, is of no use.
    group = _made.get(key)
    if group is None or group not in dist.distributed_c10d._world.pg_map:
        group = dist.new_group(list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True)
        _made[key] = group
    return group
