"""Does a run survive its disk? A disk that fills up, and one that turns read-only, in mid-run.

A small file system of its own (tmpfs, so this needs root on Linux) holds the checkpoint. While a
flow and a descent run, it is filled to the last byte by another file, or remounted read-only. The
run has to stop by itself with a record of what it had, and the file has to be whole. Then the disk
is given back, the same call goes on, and its record is compared bit for bit with that of a run
that was never disturbed.

    sudo python benchmarks/faults.py [--quick] [--out FOLDER]
"""

import contextlib
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from common import Report, begin, parser, table
from kill import VERBS, differing, run

AFTER = 3.0
"""Seconds of the run before the fault."""


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def fill(folder: Path) -> None:
    """Write until nothing fits any more."""
    with contextlib.suppress(OSError), open(folder / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def empty(folder: Path) -> None:
    (folder / "ballast").unlink()


def freeze(folder: Path) -> None:
    """Read-only, once no write is under way."""
    while subprocess.run(
        ["mount", "-o", "remount,ro", folder], stderr=subprocess.DEVNULL
    ).returncode:
        time.sleep(0.01)


def thaw(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", folder], check=True)


FAULTS = {"full": (fill, empty), "read-only": (freeze, thaw)}


def disturb(verb: str, fault: str, folder: Path, whole) -> dict:
    """One run whose disk fails, and the same call on the mended disk."""
    path = folder / f"{verb}.npz"
    break_it, mend = FAULTS[fault]
    timer = threading.Timer(AFTER, break_it, [folder])
    timer.start()
    record = run(verb, path)
    timer.join()
    with np.load(path) as file:
        kept = int(file["points/num_steps"][-1])
    mend(folder)
    again = run(verb, path)
    path.unlink()
    return {
        "verb": verb,
        "fault": fault,
        "status": record.attrs["status"],
        "message": record.attrs["message"],
        "steps_in_the_record": int(record.num_steps[-1]),
        "steps_in_the_file": kept,
        "finite": bool(np.isfinite(record.log_risk).all()),
        "differing": differing(again, whole),
    }


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mount(folder, "size=4m")
        try:
            for verb in VERBS[: 1 if options.quick else None]:
                whole = run(verb, None)
                rows += [disturb(verb, fault, folder, whole) for fault in FAULTS]
        finally:
            subprocess.run(["umount", folder], check=True)
    table(rows, "verb:s fault:s status:s steps_in_the_record:d steps_in_the_file:d")
    report.write(
        None,
        rows=rows,
        identical=not any(row["differing"] for row in rows),
        stopped_by_the_disk=all(row["status"] == "checkpoint_failed" for row in rows),
    )


if __name__ == "__main__":
    main()
