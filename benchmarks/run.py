"""Run every benchmark, one after the other in one process group, and write the table of them all.

    python benchmarks/run.py [--quick] [--only NAME] [--out FOLDER]

Each script is a process of its own and writes JSON and PNG to ``results`` (``--quick``: to a folder
that is named, or nowhere). Then ``results/README.md`` is made from all JSON files there: what each
answers, on which machine and versions, with which command. A script that fails does not stop the
others; the exit code is the number of those that failed.
"""

import argparse
import ast
import json
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
HELPERS = ("common", "peers", "rivals", "run", "saving")


def scripts() -> dict[str, Path]:
    """Name: script, for every benchmark."""
    found = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
    return {name: path for name, path in found.items() if name not in HELPERS}


def question(path: Path) -> str:
    """The first line of a script."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return doc.splitlines()[0]


def overview(folder: Path) -> str:
    """The table of all results of a folder, as Markdown."""
    known = scripts()
    rows = [
        "# Results",
        "",
        "Made by `python benchmarks/run.py` from the JSON files here; each holds all its figures.",
        "",
        "| script | question | figure | command | JAX | load |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        name = Path(document["command"].split()[1]).stem
        asked = question(known[name]) if name in known else ""
        picture = path.with_suffix(".png")
        shown = f"[png]({picture.name})" if picture.exists() else ""
        version = document.get("versions", {}).get("jax_version", "")
        load = document.get("load_average_before", [""])[0]
        rows.append(
            f"| [{path.stem}]({path.name}) | {asked} | {shown} | `{document['command']}` "
            f"| {version} | {load} |"
        )
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--only", action="append", help="this script, or several")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args()
    known = scripts()
    chosen = options.only or list(known)
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(known)}")
    arguments = ["--quick"] * options.quick
    arguments += ["--out", str(options.out)] if options.out else []
    failed = []
    for name in chosen:
        print(f"==> {name}: {question(known[name])}", flush=True)
        began = time.perf_counter()
        done = subprocess.run([sys.executable, str(known[name]), *arguments], check=False)
        print(
            f"==> {name}: {time.perf_counter() - began:.0f} s, exit {done.returncode}", flush=True
        )
        if done.returncode:
            failed.append(name)
    folder = options.out or (None if options.quick else FOLDER / "results")
    if folder is not None:
        (folder / "README.md").write_text(overview(folder), encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
