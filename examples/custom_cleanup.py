"""Clean-up of one's own: something outside the tree that belongs to a slot is reset together with it.

Here it is a scratch directory per slot (it could be a database or a port). `configure` makes it when the slot is made,
`reset` empties it after every lease, and `check` refuses a slot whose scratch directory is not empty: a slot that a
callback rejects is quarantined, and the lessee gets another one.

    python examples/custom_cleanup.py [URL]

Without a URL it uses the repository that this file lies in. Everything happens in a temporary directory.
"""

import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from repopool_async import PoolConfig, PoolManager, Slot


class Scratch:
    """A directory per slot, outside the tree."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def of(self, slot_id: str) -> Path:
        """Return the slot's directory."""
        return self.root / slot_id

    def configure(self, slot: Slot) -> None:
        """Make the directory of a new slot."""
        self.of(slot.slot_id).mkdir(parents=True)

    async def reset(self, slot: Slot) -> None:
        """Empty the directory; a callback may be async."""
        await asyncio.to_thread(self._empty, self.of(slot.slot_id))
        print(f"  reset: the scratch directory of {slot.slot_id} is empty again")

    def check(self, slot: Slot) -> None:
        """Reject a slot whose directory is not empty; a callback rejects by raising."""
        if left := sorted(path.name for path in self.of(slot.slot_id).iterdir()):
            raise RuntimeError(f"scratch directory holds {left}")

    @staticmethod
    def _empty(directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()


async def main(url: str) -> None:
    """Show each callback at work, then the clean-up log."""
    with tempfile.TemporaryDirectory(prefix="repopool-example-") as top:
        scratch = Scratch(Path(top, "scratch"))
        manager = PoolManager(
            PoolConfig(f"{top}/workspaces"), configure=scratch.configure, check=scratch.check, reset=scratch.reset
        )
        async with manager:
            pool = await manager.create_pool("example", url, num_slots=2)

            print("an ordinary lease leaves something in the scratch directory")
            async with pool.lease() as slot:
                (scratch.of(slot.slot_id) / "cache.bin").write_bytes(b"secret of the first lessee")
            await manager.wait_clean()

            print("\nsomebody puts a file there while nobody has the slot: check rejects it")
            spoilt = slot.slot_id
            (scratch.of(spoilt) / "from-outside").touch()
            async with pool.lease() as slot:
                print(f"  {spoilt} was passed over; the lessee got {slot.slot_id}")
            await manager.wait_clean()
            print(f"  {spoilt} is in state {(await manager.get_slot_status(spoilt)).state}")

            print("\nrepaired, it is good again")
            await manager.repair_slot(spoilt)
            print(f"  {spoilt} is in state {(await manager.get_slot_status(spoilt)).state}")

            print(f"\nclean-up log of {spoilt}:")
            for result in await manager.get_cleanup_log(spoilt):
                outcome = ", ".join(result.steps) if result.success else f"FAILED: {result.error}"
                print(f"  {result.started_at:%H:%M:%S}  {result.operation:<10} {outcome}")


def this_repository() -> str:
    """Return the top level of the checkout that this file lies in."""
    return next(str(path) for path in Path(__file__).resolve().parents if (path / ".git").exists())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else this_repository()))
