from .topology import TwoSidesTopology, check_topology, two_sides  # noqa: F401
