"""The port of the first process, where the processes of a run meet: whether it can be had."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from blindvalm_jax.errors import UserError

_TPU_PORT = "8482"  # JAX's own where TPUs tell it the processes


def check_port(where: str, *, process: int | None) -> None:
    """Refuses a port of this machine that somebody else has; JAX would end by a segmentation fault.

    where: `auto` or HOST:PORT. Only the process that is to listen there is asked: of `auto` the
    first one of TPU pods on GKE, whose variables say so; elsewhere JAX alone knows which it is.

    Raises:
      UserError: it is taken, or may not be had.
    """
    host, _, port = where.rpartition(":")
    if host and process != 0:
        return
    if not host:
        if not _is_first_of_tpus():
            return
        port = os.environ.get("JAX_COORDINATOR_PORT") or _TPU_PORT
    code = _refused(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or f"[::]:{port}")
    if code is None:
        return
    cause = "in use" if code == errno.EADDRINUSE else f"not to be had ({os.strerror(code)})"
    other = "HOST:PORT with another port" if host else "JAX_COORDINATOR_PORT=ANOTHER"
    raise UserError(
        f"--distributed={where}: port {port} of this machine, where the processes are to meet, is "
        f"{cause}: end what listens there, perhaps a run of before (`ss -ltnp` names it), or give "
        f"{other} to all processes"
    )


def _is_first_of_tpus() -> bool:
    """Whether the variables that GKE sets in TPU pods say that this is the first process of all."""
    return (
        os.environ.get("TPU_WORKER_ID") == "0"
        and os.environ.get("MEGASCALE_SLICE_ID", "") in ("", "0")
        and bool({"TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"} & os.environ.keys())
    )


def _refused(address: str) -> int | None:
    """The error number with which the system refuses to listen at an address, or None."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(socket.gaierror, ValueError):  # JAX says what is wrong with it
        [(family, kind, protocol, _, place), *_] = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )
        try:
            with socket.socket(family, kind, protocol) as probe:
                # As gRPC does: connections of a run that has just ended are no reason to refuse.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                probe.bind(place)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return error.errno
            if host == "[::]":  # a machine without IPv6
                return _refused(f"0.0.0.0:{port}")
    return None
