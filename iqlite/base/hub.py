"""Without a network, say so at once: the hub's client would try for half a minute and print every attempt."""

from __future__ import annotations

import logging

CONNECT_SECONDS = 4.0


def offline_without_network() -> None:
    """Puts the hub's client into offline mode (the local cache still serves) if its host can't be reached; a proxy is trusted."""
    import socket
    import urllib.request
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    where = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((where.hostname or "", where.port or 443), CONNECT_SECONDS).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
