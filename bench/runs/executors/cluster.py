"""A Ray cluster: one of the run's own, or one that is joined; and how many workers there is room for."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from bench.errors import UserError
from bench.names import install_extra

CONNECT_S = 15.0
"""How long a cluster has to answer."""
OBJECT_STORE_BYTES = 200_000_000
"""Of a cluster of the run's own: what passes between its processes is small."""
_QUIET: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}


def ray_library() -> Any:
    """Ray, quiet. Raises :class:`UserError` where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would announce, for every worker without a GPU, that it will leave a variable alone one day.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError(f"--executor=ray needs Ray: {install_extra('ray')}") from None
    return ray


def temporary_folder() -> str:
    """For a cluster of the run's own."""
    # The path of a socket has 107 characters at most, and Ray needs sixty of them.
    short = len(tempfile.gettempdir()) < 30
    return tempfile.mkdtemp(prefix="arkv-ray-", dir=None if short else "/tmp")


def start_cluster(ray: Any, folder: str) -> None:
    """A cluster on this machine that ends with the run."""
    ray.init(
        address="local",
        include_dashboard=False,
        _temp_dir=folder,
        object_store_memory=OBJECT_STORE_BYTES,
        **_QUIET,
    )


def join_cluster(ray: Any, address: str) -> None:
    """Connect with a cluster that is there. Raises :class:`UserError` within :data:`CONNECT_S` where nobody answers."""
    given = address
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    if address != "auto":
        _knock(address)
    failed: list[BaseException] = []

    def connect() -> None:
        try:
            ray.init(address=given, **_QUIET)
        except (OSError, RuntimeError, ValueError, ImportError, AssertionError) as error:
            failed.append(error)

    # Ray itself would try for more than a minute.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(CONNECT_S)
    if attempt.is_alive():
        raise UserError(f"--address={address}: no Ray cluster answered there within {CONNECT_S:.0f} s")
    if failed:
        raise UserError(_not_connected(address, failed[0])) from failed[0]


def capacity(nodes: Iterable[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """How many workers with so many cores and GPUs each there is room for on ``ray.nodes()``."""
    room = 0
    for node in nodes:
        if node["Alive"]:
            resources = node["Resources"]
            most = int(resources.get("CPU", 0) // cpus)
            if gpus:
                have = resources.get("GPU", 0)
                # Shares of one GPU never reach over to another one.
                most = min(most, int(have // gpus) if gpus >= 1 else int(have) * int(1 / gpus + 1e-9))
            room += most
    return room


def _knock(address: str) -> None:
    """Raises :class:`UserError` where nothing listens at ``[ray://]host:port``."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        raise UserError(f"--address={address}: give auto, local, host:port or ray://host:port", exit_code=2)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--address={address}: no Ray cluster answers there ({error})") from None


def _not_connected(address: str, error: BaseException) -> str:
    """What a failed connection means to a user."""
    if isinstance(error, ImportError):
        return f"--address={address}: an address with ray:// needs Ray's client: pip install 'ray[client]'"
    if address == "auto":
        return (
            "--address=auto: no Ray cluster runs on this machine: start one (`ray start --head`), or give --address "
            "local or host:port"
        )
    return f"--address={address}: {' '.join(str(error).split())[:300]}"
