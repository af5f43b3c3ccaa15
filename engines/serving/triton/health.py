"""Asks a Triton server, from inside one of its stubs, whether it takes connections: where it listens is read from /proc."""

from __future__ import annotations

import http.client
import os
import socket
import struct
from pathlib import Path

LISTEN = "0A"  # a state in /proc/net/tcp
SECONDS = 2.0
FLAG, DEFAULT_PORT = "--http-port", 8000


class Health:
    """The HTTP endpoint of a server.

    Args:
        server: its process id, one of the same user's.
        port: where its HTTP endpoint is.
    """

    def __init__(self, server: int, port: int) -> None:
        self._server, self._port = server, port

    def hangs_up(self) -> bool:
        """Whether it listens, but cuts every connection: what Triton does from the moment that it is told to stop until it ends.

        One that is slow does not, and of one that does not listen nothing is known.
        """
        return any(_status(host, port) is None for host, port in listening(self._server) if port == self._port)


def http_port(server: int) -> int:
    """What a tritonserver was told with --http-port, or its default."""
    words = Path(f"/proc/{server}/cmdline").read_bytes().decode().replace("=", "\0").split("\0")
    return int(words[words.index(FLAG) + 1]) if FLAG in words else DEFAULT_PORT


def listening(pid: int) -> list[tuple[str, int]]:
    """Where a process listens over IPv4: addresses and ports. Nothing for one that has ended."""
    try:
        rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
        files = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
    except OSError:  # it, or one of its files, has just gone
        return []
    local = [row[1].split(":") for row in rows if row[3] == LISTEN and f"socket:[{row[9]}]" in files]
    return [(socket.inet_ntoa(struct.pack("=I", int(address, 16))), int(port, 16)) for address, port in local]


def _status(host: str, port: int) -> int | None:
    """HTTP status of the liveness endpoint; None where the connection is refused or cut, 0 for anything else that is no answer."""
    connection = http.client.HTTPConnection("127.0.0.1" if host == "0.0.0.0" else host, port, timeout=SECONDS)
    try:
        connection.request("GET", "/v2/health/live")
        return connection.getresponse().status
    except ConnectionError:
        return None
    except (http.client.HTTPException, OSError):  # another protocol, or too slow
        return 0
    finally:
        connection.close()
