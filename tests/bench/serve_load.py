"""The server of a real run under load: requests at once against one at a time, and faults by the hundred. `python -m tests.bench.serve_load RUN`

Starts `iqlite serve RUN` on a free port and asks it with the openai package and bare sockets. Prints JSON, a line each part.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil

WORDS = ("cook", "read", "plant", "draw", "repair", "learn", "visit", "sing")
PLACES = ("in winter", "with children", "in Rome", "on a Sunday")
TOKENS = 24


def main() -> None:
    """Both parts."""
    run, *rest = sys.argv[1:]
    program = [sys.executable, "-m", "iqlite", "serve", run, "--port", "0", "--key", "s3cret", "--queue", "64", *rest]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[2])
    try:
        assert process.stdout is not None
        url = next(found[1] for line in process.stdout if (found := re.search(r"API +(http://\S+)/v1", line)))
        threading.Thread(target=process.stdout.read, daemon=True).start()
        print(json.dumps(together(url)), flush=True)
        print(json.dumps(faults(url, psutil.Process(process.pid))), flush=True)
    finally:
        process.terminate()
        process.wait()


def client(url: str) -> openai.OpenAI:
    """The real client, which asks again by itself when the queue is full."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret", max_retries=50, timeout=600)


def together(url: str) -> dict[str, Any]:
    """32 greedy requests one at a time and then at once: the same texts, and tokens a second."""
    asked = [f"What should I {word} {place}?" for word in WORDS for place in PLACES]
    clients = client(url)

    def ask(question: str) -> tuple[str, int]:
        reply = clients.chat.completions.create(
            model="policy", messages=[{"role": "user", "content": question}], max_tokens=TOKENS, temperature=0
        )
        assert reply.usage is not None
        return reply.choices[0].message.content or "", reply.usage.completion_tokens

    ask(asked[0])
    began = time.perf_counter()
    alone = [ask(one) for one in asked]
    between = time.perf_counter()
    with ThreadPoolExecutor(len(asked)) as pool:
        at_once = [*pool.map(ask, asked)]
    ended = time.perf_counter()
    tokens = sum(count for _, count in alone)
    rates = [sum(count for _, count in found) / seconds for found, seconds in ((alone, between - began), (at_once, ended - between))]
    return {
        "requests": len(asked),
        "tokens": tokens,
        "same_texts": sum(one == other for one, other in zip(alone, at_once, strict=True)),
        "tokens_per_s_alone": round(rates[0], 1),
        "tokens_per_s_at_once": round(rates[1], 1),
        "times_faster": round(rates[1] / rates[0], 2),
    }


def faults(url: str, process: psutil.Process) -> dict[str, Any]:
    """Three rounds of 200 requests: a third ordinary, others malformed, a megabyte long, with a wrong key, or left by their client."""
    memory, took = [process.memory_info().rss], []
    statuses: dict[str, dict[str, int]] = {}
    for _ in range(3):
        began = time.perf_counter()
        with ThreadPoolExecutor(16) as pool:
            for kind, status in pool.map(lambda number: one(url, number), range(200)):
                told = statuses.setdefault(kind, {})
                told[str(status)] = told.get(str(status), 0) + 1
        took.append(round(time.perf_counter() - began, 1))
        client(url).chat.completions.create(model="policy", messages=[{"role": "user", "content": "Still there?"}], max_tokens=2)
        memory.append(process.memory_info().rss)
    return {
        "statuses": {kind: dict(sorted(told.items())) for kind, told in sorted(statuses.items())},
        "seconds": took,
        "memory_mib": [round(size / 2**20) for size in memory],
    }


def one(url: str, number: int) -> tuple[str, int]:
    """(kind, status) of a request; 0 where the client left before there was one."""
    kind = ("plain", "malformed", "megabyte", "key", "gone", "plain", "half")[number % 7]
    body: dict[str, Any] = {
        "model": ("base", "policy")[number % 2],
        "messages": [{"role": "user", "content": f"Say {number}."}],
        "max_tokens": 8,
    }
    if kind == "megabyte":
        body["messages"][0]["content"] = "word " * 200_000
    if kind == "gone":
        body |= {"max_tokens": 400, "stream": True}
    data = json.dumps(body).encode()
    if kind == "malformed":
        data = data[: len(data) // 2]
    if kind in ("gone", "half"):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 300) as line:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer s3cret\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            line.sendall(head.encode() + (data if kind == "gone" else data[:20]))
            if kind == "gone":
                line.recv(64)
        return kind, 0
    key = "wrong" if kind == "key" else "s3cret"
    asked = urllib.request.Request(
        f"{url}/v1/chat/completions", data, {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    )
    for _ in range(200):
        try:
            with urllib.request.urlopen(asked, timeout=300) as reply:
                json.load(reply)
                return kind, int(reply.status)
        except urllib.error.HTTPError as error:
            json.load(error)
            if error.code != 429:
                return kind, error.code
            time.sleep(0.5)
    return kind, 429


if __name__ == "__main__":
    main()
