"""Run a command while no other one holds the same lock, after waiting for it: alone.py LOCK COMMAND...

For make, before anything is installed: it needs nothing but Python. The command and the programs that it starts hold
the lock. The system takes it back when the last of them has ended, in whatever way.
"""

import os
import sys


def alone(lock, command):
    import fcntl  # not on Windows, which has no make; there this file is only looked through for examples

    os.makedirs(os.path.dirname(lock), exist_ok=True)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{command[0]}: waiting for the one that is at work here", file=sys.stderr, flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    os.set_inheritable(handle, True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    alone(sys.argv[1], sys.argv[2:])
