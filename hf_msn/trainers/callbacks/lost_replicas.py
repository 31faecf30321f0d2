"""Which replica is lost, where the trainer's own exchanges between the ranks fail without saying."""

import torch.distributed as dist

from ...distributed.codistillation import Codistillation
from ...distributed.comm.exchange import PeerError

_LOOK_SECONDS = 2.0  # that a closed connection may take to be seen


def name_lost_replica(sync: Codistillation, error: BaseException) -> None:
    """Does nothing if `error` is not of a broken connection, or the replicas have none that tells.

    Raises:
        PeerError: If a replica is lost, with its rank.
    """
    is_broken = isinstance(error, dist.DistError) or "onnection" in str(error)
    if isinstance(error, RuntimeError) and not isinstance(error, PeerError) and is_broken:
        sync.look_for_lost(_LOOK_SECONDS)
