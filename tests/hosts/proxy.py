"""A TCP proxy for tests, which can freeze, cut and slow what goes through it. Lives in the test's own event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Proxy:
    """Stands in front of one port of this machine.

    Attributes:
        port: its own. delay_seconds: added to every byte, each way. connections: how many there have been.
    """

    def __init__(self, target: int, delay_seconds: float) -> None:
        self.port = 0
        self.delay_seconds = delay_seconds
        self.connections = 0
        self._target = target
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_refusing = False
        self._cut_after: int | None = None

    def freeze(self) -> None:
        """Pass nothing on any more, and keep every connection open."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def cut(self) -> None:
        """Break every connection."""
        for writer in self._writers:
            writer.transport.abort()

    def cut_after(self, count: int) -> None:
        """Break the next connection, once, when so many bytes have come back through it."""
        self._cut_after = count

    def refuse(self, is_refusing: bool = True) -> None:
        """Break every new connection, too."""
        self._is_refusing = is_refusing

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._is_refusing:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, far_writer}
        limit, self._cut_after = self._cut_after, None
        for source, target, most in ((reader, far_writer, None), (far_reader, writer, limit)):
            task = asyncio.create_task(self._pass_on(source, target, most))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, most: int | None = None
    ) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                await self._flowing.wait()
                if not data:
                    target.close()
                    return
                target.write(data)

        delivery = asyncio.create_task(deliver())
        try:
            data = b"?"
            while data:
                try:
                    data = await source.read(65536)
                except OSError:
                    data = b""
                if most is not None:
                    data, most = data[:most], most - len(data)
                queue.put_nowait((loop.time() + self.delay_seconds, data))
                if most is not None and most <= 0:
                    target.transport.abort()
                    return
            await delivery
        finally:
            delivery.cancel()

    async def close(self) -> None:
        self.cut()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def proxy(target: int, *, delay_seconds: float = 0.0) -> AsyncIterator[Proxy]:
    """Have a proxy in front of a port while the block runs."""
    one = Proxy(target, delay_seconds)
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    one.port = server.sockets[0].getsockname()[1]
    try:
        yield one
    finally:
        server.close()
        await one.close()
        await server.wait_closed()
