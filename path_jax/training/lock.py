"""One run at a time in a working directory."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
from pathlib import Path

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK)


@contextlib.contextmanager
def owned(workdir: Path):
    """Holds workdir/lock.json, which names the owner, for as long as the context lasts.

    The lock is the kernel's (flock), so that of a dead process is gone with it, however it died, and there is nothing
    to clean up. NFS from version 4 on carries it between hosts; where a file system has no locks the run goes on
    without, after one line. Of several processes of a run only process 0 takes it.

    Raises:
      ValueError: if another process holds it; names that process.
      OSError: if the file cannot be written.
    """
    with (workdir / "lock.json").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{workdir} is in use by {_owner(file)}; wait for it, or stop it first") from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            print(f"{workdir} has no file locks; see to it that only one run uses it", file=sys.stderr)
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}) + "\n")
        file.flush()
        yield


def _owner(file) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read(1000))
        return f"process {owner['process']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
