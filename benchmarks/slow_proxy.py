"""A proxy on this machine that holds back what a client sends: python -m benchmarks.slow_proxy.

    python -m benchmarks.slow_proxy PORT PORT_OF_THE_SERVER MILLISECONDS

It knows nothing of what it passes on. A small request is one piece, and so waits once.
"""

import asyncio
import contextlib
import sys

_PIECE = 1 << 18  # bytes


def run(port: int, server_port: int, seconds: float) -> None:
    """Passes everything on, without an end.

    Args:
        port: to listen at.
        server_port: of the server.
        seconds: before each piece from a client.
    """

    async def forward(reader, writer, wait):
        with contextlib.suppress(ConnectionError):
            while content := await reader.read(_PIECE):
                if wait:
                    await asyncio.sleep(wait)
                writer.write(content)
                await writer.drain()
        writer.close()

    async def serve(reader, writer):
        try:
            there, back = await asyncio.open_connection("127.0.0.1", server_port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(forward(reader, back, seconds), forward(there, writer, 0))

    async def listen():
        server = await asyncio.start_server(serve, "127.0.0.1", port, limit=_PIECE)
        async with server:
            await server.serve_forever()

    asyncio.run(listen())


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) / 1e3)
