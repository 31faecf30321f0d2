from .topology import RepairedTopology, Topology  # noqa: F401
