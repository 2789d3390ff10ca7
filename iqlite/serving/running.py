"""A server on its socket: bound before anything is loaded, so that a port that is taken is said at once."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from iqlite.errors import RunError

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

LOCALHOST = ("127.0.0.1", "localhost", "::1")


def check_installed() -> None:
    """RunError without FastAPI and uvicorn."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise RunError("serving needs FastAPI and uvicorn: pip install 'iqlite[serve]'.") from None


def bound(host: str, port: int) -> socket.socket:
    """A socket at host and port (0: any that is free); RunError if it can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise RunError(f"{host}:{port} can't be served at ({why}): give another --port or --host.") from None
    return made


def address(made: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = made.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def server(app: FastAPI) -> uvicorn.Server:
    """uvicorn with this application, quiet."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=2,
            timeout_keep_alive=30,
        )
    )


@contextmanager
def running(app: FastAPI, made: socket.socket) -> Iterator[str]:
    """Serves in a thread of its own for as long as the block lasts; yields the URL."""
    serving = server(app)
    thread = threading.Thread(target=serving.run, kwargs={"sockets": [made]}, daemon=True)
    thread.start()
    while not serving.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield address(made)
    finally:
        serving.should_exit = True
        thread.join(timeout=10)
