"""Without a network, say so at once: the hub's client would try for half a minute and print every attempt."""

from __future__ import annotations

import logging

CONNECT_SECONDS = 4.0


def offline_without_network() -> None:
    """Puts the hub's client into offline mode (the local cache still serves) if its host can't be reached; a proxy is trusted."""
    from huggingface_hub import constants

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not constants.HF_HUB_OFFLINE and not somebody_answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True


def somebody_answers(url: str) -> bool:
    """False if nothing takes a connection at an address within a few seconds; a proxy in between is trusted."""
    import socket
    import urllib.request
    from urllib.parse import urlsplit

    where = urlsplit(url)
    host, port = where.hostname or "", where.port or (80 if where.scheme == "http" else 443)
    if urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return True
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
