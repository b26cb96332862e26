"""What the loopback Hub keeps in memory: repositories with their commits, and the content of large files."""

import hashlib
from dataclasses import dataclass, field

#: Endings that the Hub stores as LFS objects; everything else goes into the commit.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet")


@dataclass(frozen=True)
class File:
    """One stored file.

    Args:
        content: Its bytes.
        lfs: Whether it came in as an LFS object.
    """

    content: bytes
    lfs: bool

    @property
    def blob_id(self) -> str:
        """Git's name for the content."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        """What the Hub gives clients to recognise the content by."""
        return hashlib.sha256(self.content).hexdigest() if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """A state of a repository.

    Args:
        oid: 40 hexadecimal digits.
        message: Summary.
        files: Files by path.
    """

    oid: str
    message: str
    files: dict[str, File]


@dataclass
class Repository:
    """A repository of one type and name.

    Args:
        name: `owner/name`.
        private: Whether reading needs the owner's token.
        branches: Commits by branch, oldest first; a branch that was not written to has one empty commit.
    """

    name: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches.setdefault("main", [Commit(hashlib.sha1(self.name.encode()).hexdigest(), "initial commit", {})])

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch name or of an identifier.

        Args:
            revision: Branch or 40 hexadecimal digits.
        """
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)

    def commit(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        """Add a commit.

        Args:
            branch: Branch that moves on.
            message: Summary.
            files: All files of the new state.
        """
        history = self.branches[branch]
        state = "".join(f"{path}:{file.blob_id}\n" for path, file in sorted(files.items()))
        oid = hashlib.sha1(f"{history[-1].oid}\n{message}\n{state}".encode()).hexdigest()
        history.append(Commit(oid, message, files))
        return history[-1]

    @property
    def messages(self) -> list[str]:
        """Summaries of the commits on `main`, without the empty first one."""
        return [commit.message for commit in self.branches["main"][1:]]

    @property
    def files(self) -> dict[str, bytes]:
        """Content of `main` by path."""
        return {path: file.content for path, file in self.branches["main"][-1].files.items()}
