"""A store that is far away: forwards connections to a server of this machine, and holds back each answer for a set time.

    python bench/far_store.py PORT MILLISECONDS       prints the port that it listens on, on loopback

What it adds is the time of light and switches alone: it limits no rate, and requests on different connections do not wait for each other.
"""

from __future__ import annotations

import asyncio
import sys

CHUNK = 1 << 20
Due = tuple[float, bytes]


async def serve(port: int, delay_s: float) -> None:
    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection("127.0.0.1", port, limit=CHUNK)
        held: asyncio.Queue[Due] = asyncio.Queue()
        await asyncio.gather(_pass(reader, ours), _hold(theirs, held, delay_s), _release(held, writer))

    server = await asyncio.start_server(forward, "127.0.0.1", 0, limit=CHUNK)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(CHUNK):
        writer.write(chunk)
        await writer.drain()
    writer.close()


async def _hold(reader: asyncio.StreamReader, held: asyncio.Queue[Due], delay_s: float) -> None:
    loop, chunk = asyncio.get_running_loop(), b"begin"
    while chunk:
        chunk = await reader.read(CHUNK)
        held.put_nowait((loop.time() + delay_s, chunk))


async def _release(held: asyncio.Queue[Due], writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due, chunk = await held.get()
        await asyncio.sleep(max(0.0, due - loop.time()))
        if not chunk:
            break
        writer.write(chunk)
        await writer.drain()
    writer.close()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2]) / 1000))
