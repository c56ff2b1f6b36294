"""Runs the application: `emcl serve`."""

from __future__ import annotations

import os
import socket
import threading
import webbrowser

import torch
import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware

from emcl.errors import UserError
from emcl.search.index import VideoIndex
from emcl.serve.api import build_app
from emcl.serve.protection import LOOPBACK
from emcl.serve.request_limits import Limits

GRACE = 10
"""Seconds that running requests get to finish when the server is asked to stop."""


def serve(index: VideoIndex, limits: Limits, address: socket.socket, *, host: str, browser: bool = False) -> None:
    """Serves until SIGINT or SIGTERM; running requests are answered first.

    Args:
        address: the socket that `bind` returned for `host`.
    """
    # the other half of the cores decodes, makes pictures and sends responses; with all cores the model was half as fast
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 2) // 2)))
    app = build_app(index, limits)
    if host in LOOPBACK:  # against DNS rebinding: other sites must not read the videos
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    url = f"http://{host}:{address.getsockname()[1]}"
    print(f"{len(index)} windows of {index.folder}: {url} (API: {url}/docs); Ctrl-C stops", flush=True)
    if host not in LOOPBACK:
        print("note: whoever reaches this address sees the indexed videos; there is no password", flush=True)
    if browser:
        threading.Timer(1, webbrowser.open, [url]).start()
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE, server_header=False)
    uvicorn.Server(config).run([address])


def bind(host: str, port: int) -> socket.socket:
    """Binds an address before the model is loaded; requests that arrive meanwhile wait.

    Raises:
        UserError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # explicit protocol: asyncio turns off Nagle's delay of 40 ms only for sockets declared as TCP
    address = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        address.bind((host.strip("[]"), port))
        address.listen(128)
    except (OSError, OverflowError) as error:
        address.close()
        raise UserError(f"cannot listen at {host}:{port} ({error}); give another --port or --host") from None
    return address
