"""A client that loads a server, in a process of its own. `python load_client.py KIND URL CONNECTIONS`

KIND "bytes" sends requests over raw sockets and only reads the bytes of the answers: what it takes from the server's
cores is as little as Python allows. KIND "openai" is the client of OpenAI, which also parses answers and checks types.

For each number on stdin, it asks for so many pictures, with seeds from 0, over all connections. It prints the seconds
until the last one is there, and those of each request, as JSON.
"""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

PROMPT = "a red heart"
HEAD = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "


def reader_of_bytes(url: str) -> Callable[[int], None]:
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port))
    buffer = memoryview(bytearray(2**24))

    def ask(seed: int) -> None:
        body = json.dumps({"prompt": PROMPT, "seed": seed}).encode()
        connection.sendall(b"%b%d\r\n\r\n%b" % (HEAD, len(body), body))
        count = connection.recv_into(buffer)
        while (end := buffer[:count].tobytes().find(b"\r\n\r\n")) < 0:
            count += connection.recv_into(buffer[count:])
        head = buffer[:end].tobytes().lower()
        assert head.startswith(b"http/1.1 200 "), head
        whole = end + 4 + int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        while count < whole:
            count += connection.recv_into(buffer[count:])

    return ask


def client_of_openai(url: str) -> Callable[[int], None]:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)

    def ask(seed: int) -> None:
        assert client.images.generate(prompt=PROMPT, extra_body={"seed": seed}).data

    return ask


def ask_all(clients: list[Callable[[int], None]], count: int) -> list[float]:
    """Ask for pictures over all connections. Returns the seconds of each request."""
    left, times = list(range(count))[::-1], []

    def work(ask: Callable[[int], None]) -> None:
        while left:
            try:
                seed = left.pop()
            except IndexError:  # Another thread took the last one.
                return
            begun = time.perf_counter()
            ask(seed)
            times.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=work, args=(ask,)) for ask in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def main(kind: str, url: str, connections: int) -> None:
    """Serve requests of stdin."""
    make = {"bytes": reader_of_bytes, "openai": client_of_openai}[kind]
    clients = [make(url) for _ in range(connections)]
    for line in sys.stdin:
        begun = time.perf_counter()
        times = ask_all(clients, int(line))
        answer = {"seconds": time.perf_counter() - begun, "times": times}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
