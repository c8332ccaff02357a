"""Runs Synapse as a child that does not outlive its parent.

The parent holds the other end of standard input, which the system closes when the parent ends, even if it is killed. The
directory named by SENDERTRUST_SYNAPSE_SCRATCH, if any, is then deleted, as the parent no longer can. What is in it needs not
survive a power failure, so no commit waits for the disk: a quarter of Synapse's time was that.
"""

import os
import runpy
import shutil
import sqlite3
import threading

scratch = os.environ.get("SENDERTRUST_SYNAPSE_SCRATCH")


def end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def connect_lazily(*args, connect=sqlite3.connect, **options) -> sqlite3.Connection:
    connection = connect(*args, **options)
    connection.execute("PRAGMA synchronous=OFF")
    return connection


if scratch:
    sqlite3.connect = connect_lazily
threading.Thread(target=end_with_parent, name="end_with_parent", daemon=True).start()
runpy.run_module("synapse.app.homeserver", run_name="__main__", alter_sys=True)
