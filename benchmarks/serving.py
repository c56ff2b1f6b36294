"""Load test of `emcl serve` with many clients: requests per second, latencies, errors, the server's memory.

    python benchmarks/serving.py INDEX --model RUN [--clients 50] [--seconds 60]

Each client sends requests one after another: a search by sentence, the first hit's thumbnail and video, and sometimes a
caption, an answer, a curve, or a search by an uploaded video. The server is a separate process on this machine, so
clients and server share its cores.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white")
SHAPES = ("circle", "square", "triangle", "cross", "star")
MOVES = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks")


@dataclass
class Seen:
    """Results of all clients; many threads append to the lists."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[str] = field(default_factory=list)


class Client:
    def __init__(self, port: int, number: int, seen: Seen) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.rng, self.seen = random.Random(number), seen

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            rng = self.rng
            query = quote(f"a {rng.choice(COLORS)} {rng.choice(SHAPES)} {rng.choice(MOVES)}")
            hits = json.loads(self.ask("search", f"/api/search?query={query}") or b'{"hits": []}')["hits"]
            if not hits:
                continue
            first = hits[0]
            self.ask("thumbnail", first["thumbnail"])
            video = self.ask("video", first["video"])
            extra = rng.random()
            base = f"/api/windows/{first['window']}"
            if extra < 0.1:
                self.ask("caption", f"{base}/caption")
            elif extra < 0.2:
                self.ask("answer", f"{base}/answer?question={quote('what color is it?')}")
            elif extra < 0.3:
                self.ask("curve", f"{base}/curve?query={query}")
            elif extra < 0.4 and video:
                self.ask("search by video", "/api/search/video", video)

    def ask(self, what: str, path: str, body: bytes | None = None) -> bytes | None:
        began = time.perf_counter()
        try:
            headers = {"Content-Type": "video/mp4"} if body else {}
            self.connection.request("POST" if body else "GET", path, body, headers)
            answer = self.connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.seen.wrong.append(f"{path}: {error!r}")
            self.connection.close()
            return None
        self.seen.seconds[what].append(time.perf_counter() - began)
        if answer.status not in (200, 206):
            self.seen.wrong.append(f"{path}: {answer.status} {content[:200]!r}")
            return None
        return content


def start(index: Path, model: Path) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "emcl.cli", "serve", str(index), "--model", str(model), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert server.stdout is not None
    said = server.stdout.readline()
    return server, int(said.split("http://127.0.0.1:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    server, port = start(options.index, options.model)
    try:
        print(json.dumps(load(server, port, options.clients, options.seconds), indent=1))
    finally:
        server.terminate()
        server.wait()


def load(server: subprocess.Popen[str], port: int, clients: int, seconds: float) -> dict[str, Any]:
    seen, process = Seen(), psutil.Process(server.pid)
    Client(port, 0, seen).run(time.monotonic() + 1)  # warm-up: libraries
    seen.seconds.clear()
    before, memory = process.memory_info().rss, []
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=Client(port, n, seen).run, args=(until,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append(process.memory_info().rss)
        time.sleep(0.5)
    middle = memory[len(memory) // 2]
    total = sum(len(values) for values in seen.seconds.values())
    return {
        "clients": clients,
        "requests": total,
        "requests a second": round(total / seconds, 1),
        "errors": len(seen.wrong),
        "first errors": seen.wrong[:5],
        "MiB before, halfway, at most": [round(value / 2**20) for value in (before, middle, max(memory))],
        "ms, median and 99th percentile": {
            what: [len(values), *(round(1000 * value) for value in (statistics.median(values), percentile(values)))]
            for what, values in sorted(seen.seconds.items())
        },
    }


def percentile(values: list[float], share: float = 0.99) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


if __name__ == "__main__":
    main()
