"""A pool of two slots, from making it to looking at what it did.

    python examples/basic_pool_usage.py [URL]

Without a URL it uses the repository that this file lies in. Everything happens in a temporary directory.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from repopool_async import LeaseReleasedError, PoolConfig, PoolManager, UnknownRefError


async def main(url: str) -> None:
    """Make a pool, lease from it, show that nothing leaks, and look at what it recorded."""
    with tempfile.TemporaryDirectory(prefix="repopool-example-") as directory:
        async with PoolManager(PoolConfig(directory)) as manager:
            print(f"making a pool of {url}")
            pool = await manager.create_pool("example", url, num_slots=2)

            async with pool.lease(timeout=30) as slot:
                print(f"\nleased {slot.slot_id}: {slot.branch or 'detached'} at {slot.commit[:12]}, in {slot.path}")
                print("  newest commit:", (await slot.run("git", "log", "-1", "--format=%s")).text.strip())
                print("  remote branches:", ", ".join(await slot.list_remote_branches()))

                # A lessee may do what it likes in here ...
                (slot.path / "left-behind.txt").write_text("from the first lessee\n")
                await slot.run("git", "config", "user.name", "Somebody Else")
                await slot.run("git", "stash", "--include-untracked")
                print("  it leaves a stash, a file in it, and a changed configuration behind")
            commit = slot.commit

            await manager.wait_clean()
            # ... the next one sees a fresh clone: here of one commit, on a branch of its own.
            async with pool.lease(ref=commit, new_branch="agent/one", metadata={"task": "example"}) as slot:
                stash = (await slot.run("git", "stash", "list")).text
                name = await slot.run("git", "config", "--local", "user.name", check=False)
                print(f"\nleased {slot.slot_id}: {slot.branch} at {slot.commit[:12]}")
                print(f"  stash: {stash.strip() or 'empty'}, configured name: {name.text.strip() or 'none'}")
                print("  clean working tree:", await slot.is_clean_working_tree())

            try:
                await slot.run("git", "status")
            except LeaseReleasedError as error:
                print(f"\nafter the block: {error}")
            try:
                async with pool.lease(ref="no-such-branch"):
                    pass
            except UnknownRefError as error:
                print(f"an unknown ref: {error}")

            await manager.wait_clean()
            summary = (await manager.get_pool_summary())["example"]
            print(f"\nafter {summary.allocation_count} leases: {summary.available}/{summary.total_slots} available")
            for result in await manager.get_cleanup_log(slot.slot_id):
                print(f"  {slot.slot_id}: {result.operation:<10} {result.duration_seconds * 1000:6.1f} ms")


def this_repository() -> str:
    """Return the top level of the checkout that this file lies in."""
    return next(str(path) for path in Path(__file__).resolve().parents if (path / ".git").exists())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else this_repository()))
