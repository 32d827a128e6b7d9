"""Contaminations of refs, and of what git takes for history: replacements, grafts, shallow boundaries."""

import os

from tests.contamination.kit import Scene, register_each, remove, vector


@vector("refs")
def branch_with_commits_checked_out(scene: Scene) -> None:
    scene.git("checkout", "-q", "-b", "agent/x")
    scene.commit()


@vector("refs")
def commits_on_the_leased_branch(scene: Scene) -> None:
    scene.commit()
    scene.commit("Edit", {"README.md": "committed edit\n"})


@vector("refs")
def leased_branch_moved_back(scene: Scene) -> None:
    scene.git("reset", "-q", "--hard", "HEAD~1")


@vector("refs")
def leased_branch_deleted(scene: Scene) -> None:
    scene.git("checkout", "-q", "--detach")
    scene.git("branch", "-q", "-D", "main")


@vector("refs")
def leased_branch_renamed(scene: Scene) -> None:
    scene.git("branch", "-q", "-m", "main", "renamed")


@vector("refs")
def orphan_branch(scene: Scene) -> None:
    scene.git("checkout", "-q", "--orphan", "orphan")
    scene.commit("Orphan")


@vector("refs")
def detached_head(scene: Scene) -> None:
    scene.git("checkout", "-q", "--detach", "v1")


@vector("refs")
def other_branch_checked_out(scene: Scene) -> None:
    scene.git("checkout", "-q", "feature")


@vector("refs")
def many_branches(scene: Scene) -> None:
    head = scene.git("rev-parse", "HEAD")
    commands = "".join(f"create refs/heads/many/{number} {head}\n" for number in range(300))
    scene.git("update-ref", "--stdin", input=commands.encode())


@vector("refs")
def branch_called_head(scene: Scene) -> None:
    scene.git("update-ref", "refs/heads/HEAD", scene.forged_commit())
    scene.git("update-ref", "refs/tags/HEAD", scene.forged_commit("tag\n"))


@vector("refs")
def branch_called_like_a_commit(scene: Scene) -> None:
    head = scene.git("rev-parse", "HEAD")
    scene.git("update-ref", f"refs/heads/{head}", scene.forged_commit())
    scene.git("update-ref", f"refs/tags/{head[:10]}", scene.forged_commit())


@vector("refs")
def branch_called_like_the_remote_branch(scene: Scene) -> None:
    scene.git("update-ref", "refs/heads/origin/main", scene.forged_commit())
    scene.git("update-ref", "refs/heads/refs/heads/main", scene.forged_commit())


@vector("refs")
def refs_at_the_top(scene: Scene) -> None:
    for name in ("main", "refs/main", "v1", "origin", "tags"):
        path = scene.git_dir / name
        if not path.exists():
            path.write_text(scene.forged_commit() + "\n")


@vector("refs")
def tag_moved(scene: Scene) -> None:
    scene.git("tag", "-f", "v1", scene.forged_commit())


@vector("refs")
def tags_made(scene: Scene) -> None:
    scene.git("tag", "new")
    scene.git("tag", "-a", "-m", "Annotated", "newer", scene.forged_commit())


@vector("refs")
def tag_deleted(scene: Scene) -> None:
    scene.git("tag", "-d", "v1")


@vector("refs")
def stash(scene: Scene) -> None:
    scene.write("README.md", "stashed\n")
    scene.write("stashed-too")
    scene.git("stash", "push", "-q", "--include-untracked")


@vector("refs")
def notes(scene: Scene) -> None:
    scene.git("notes", "add", "-m", "A note", "HEAD")


@vector("refs")
def replaced_blob(scene: Scene) -> None:
    blob = scene.git("hash-object", "-w", "--stdin", input=b"replaced\n")
    scene.git("replace", scene.git("rev-parse", "HEAD:README.md"), blob)
    remove(scene.tree / "README.md")


@vector("refs")
def replaced_commit(scene: Scene) -> None:
    scene.git("replace", "HEAD", scene.forged_commit())
    scene.git("replace", "origin/feature", scene.forged_commit())


@vector("refs")
def grafts(scene: Scene) -> None:
    scene.append("info/grafts", scene.git("rev-parse", "HEAD") + "\n")


@vector("refs")
def shallow_boundary(scene: Scene) -> None:
    (scene.git_dir / "shallow").write_text(scene.git("rev-parse", "HEAD") + "\n")


@vector("refs")
def remote_tracking_branches_forged(scene: Scene) -> None:
    for name in ("main", "feature", "invented"):
        scene.git("update-ref", f"refs/remotes/origin/{name}", scene.forged_commit(name))


@vector("refs")
def remote_tracking_branches_deleted(scene: Scene) -> None:
    for name in ("main", "feature"):
        scene.git("update-ref", "-d", f"refs/remotes/origin/{name}")
    scene.git("symbolic-ref", "--delete", "refs/remotes/origin/HEAD")


@vector("refs")
def remote_head_moved(scene: Scene) -> None:
    scene.git("symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/feature")


@vector("refs")
def packed_refs_forged(scene: Scene) -> None:
    commit = scene.forged_commit()
    path = scene.git_dir / "packed-refs"
    text = path.read_text()
    remove(path)
    lines = [line if line[0] in "#^" else f"{commit} {line[41:]}" for line in text.splitlines()]
    path.write_text("\n".join(lines) + "\n")


@vector("refs")
def packed_refs_damaged(scene: Scene) -> None:
    remove(scene.git_dir / "packed-refs")
    (scene.git_dir / "packed-refs").write_bytes(os.urandom(300))


@vector("refs")
def directory_in_place_of_a_branch(scene: Scene) -> None:
    scene.git("checkout", "-q", "--detach")
    scene.git("branch", "-q", "-D", "main")
    scene.git("branch", "main/below", "HEAD")
    scene.git("branch", "feature/below", "HEAD")


@vector("refs")
def directory_in_place_of_a_remote_branch(scene: Scene) -> None:
    for name in ("main", "feature"):
        scene.git("update-ref", "-d", f"refs/remotes/origin/{name}")
        scene.git("update-ref", f"refs/remotes/origin/{name}/below", "HEAD")


@vector("refs")
def empty_directories_in_refs(scene: Scene) -> None:
    for name in ("heads/feature", "remotes/origin/main", "tags/v1", "heads/a/b/c", "remotes/other"):
        (scene.git_dir / "refs" / name).mkdir(parents=True, exist_ok=True)


def _head(scene: Scene, text: str) -> None:
    (scene.git_dir / "HEAD").write_text({"empty": "", "garbage": "\0garbage", "cut": "ref: refs/he"}.get(text, text))


_HEADS = ("empty", "garbage", "cut", "ref: refs/heads/missing", "ref: ../../../outside")
register_each("refs", _HEADS, _head, "head_is_{}")


@vector("refs")
def head_deleted(scene: Scene) -> None:
    remove(scene.git_dir / "HEAD")


@vector("refs")
def head_is_a_link(scene: Scene) -> None:
    remove(scene.git_dir / "HEAD")
    (scene.git_dir / "HEAD").symlink_to("refs/heads/missing")


@vector("refs")
def symbolic_ref_loop(scene: Scene) -> None:
    (scene.git_dir / "refs/heads/main").write_text("ref: refs/heads/loop\n")
    (scene.git_dir / "refs/heads/loop").write_text("ref: refs/heads/main\n")


@vector("refs")
def symbolic_branch(scene: Scene) -> None:
    scene.git("symbolic-ref", "refs/heads/alias", "refs/heads/main")
    scene.git("symbolic-ref", "refs/heads/main", "refs/remotes/origin/feature")


@vector("refs")
def refs_lead_outside(scene: Scene) -> None:
    target = scene.outside / "dir/refs"
    (scene.git_dir / "refs").rename(target)
    (scene.git_dir / "refs").symlink_to(target)


@vector("refs")
def one_ref_leads_outside(scene: Scene) -> None:
    remove(scene.git_dir / "refs/heads/main")
    (scene.outside / "dir/main").write_text(scene.forged_commit() + "\n")
    (scene.git_dir / "refs/heads/main").symlink_to(scene.outside / "dir/main")


@vector("refs")
def reflogs_forged(scene: Scene) -> None:
    for name in ("HEAD", "refs/heads/main", "refs/heads/invented", "refs/stash"):
        scene.append(f"logs/{name}", f"{'0' * 40} {scene.forged_commit()} Me <me@example.com> 1 +0000\tforged\n")


@vector("refs")
def reflogs_gone(scene: Scene) -> None:
    remove(scene.git_dir / "logs")


@vector("refs")
def unreachable_secret(scene: Scene) -> None:
    scene.hidden_objects.append(scene.git("hash-object", "-w", "--stdin", input=b"secret\n"))
    scene.hidden_objects.append(scene.forged_commit("secret too\n"))


@vector("refs")
def secret_in_a_pack(scene: Scene) -> None:
    secret = scene.git("hash-object", "-w", "--stdin", input=b"packed secret\n")
    scene.git("pack-objects", "-q", ".git/objects/pack/pack", input=f"{secret}\n".encode())
    scene.git("prune-packed")
    scene.hidden_objects.append(secret)
