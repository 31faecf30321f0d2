"""A slow network on one machine: each rank in a network namespace behind a rate-limited link. Linux, root."""

import os
import shutil
import subprocess

_SUBNET = "10.213.7"


class SlowNetwork:
    """Make n network namespaces on one bridge: `with SlowNetwork(4, "200mbit") as network:`; leaving removes them.

    The limit (`tc tbf`) holds in both directions of every link, as on a switch with ports of that speed.

    Args:
        ranks (`int`): Number of namespaces.
        rate (`str`): As tc writes it: "200mbit", "1gbit".

    Raises:
        RuntimeError: If this is not Linux or not root, `ip` or `tc` is missing, or the kernel refuses.
    """

    def __init__(self, ranks: int, rate: str):
        self.ranks, self.rate = ranks, rate
        tag = f"{os.getpid() % 100000}"
        self.bridge = f"hm{tag}"
        self.namespaces = [f"hfmsn-{tag}-{rank}" for rank in range(ranks)]

    interface = "eth0"

    def address(self, rank: int) -> str:
        return f"{_SUBNET}.{rank + 1}"

    def command(self, rank: int, command: list[str]) -> list[str]:
        """Return the command line that runs `command` in the namespace of `rank`."""
        return ["ip", "netns", "exec", self.namespaces[rank], *command]

    def __enter__(self) -> "SlowNetwork":
        missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
        if missing or not hasattr(os, "geteuid") or os.geteuid() != 0:
            raise RuntimeError(
                "`--rate` needs root on Linux and the commands ip and tc (package iproute2), but "
                f"{' and '.join(missing) + ' are missing' if missing else 'this is not root'}."
            )
        try:
            _run(f"ip link add {self.bridge} type bridge")
            _run(f"ip link set {self.bridge} up")
            for rank, namespace in enumerate(self.namespaces):
                port = f"{self.bridge}p{rank}"
                _run(f"ip netns add {namespace}")
                _run(f"ip link add {port} type veth peer name {self.interface} netns {namespace}")
                _run(f"ip link set {port} master {self.bridge} up")
                inside = f"ip netns exec {namespace}"
                _run(f"{inside} ip address add {self.address(rank)}/24 dev {self.interface}")
                _run(f"{inside} ip link set {self.interface} up")
                _run(f"{inside} ip link set lo up")
                limit = f"root tbf rate {self.rate} burst 256kb latency 50ms"
                _run(f"tc qdisc add dev {port} {limit}")
                _run(f"{inside} tc qdisc add dev {self.interface} {limit}")
        except RuntimeError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)
        for rank in range(self.ranks):  # gone with its namespace, but for a moment
            subprocess.run(["ip", "link", "delete", f"{self.bridge}p{rank}"], capture_output=True)
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True)


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The network could not be built: `{command}` failed: {done.stderr.strip()}.")
