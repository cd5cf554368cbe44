import subprocess
import sys
from pathlib import Path

import pytest

import gflow

CODE = """
import jax
import gflow

def kept():
    return sorted(path.name for path in folder.iterdir())

assert jax.config.jax_compilation_cache_dir is None  # importing gflow switches nothing on
jax.jit(lambda x: x + 1)(1.0)
folder = gflow.cache_programs()
assert kept() == []
jax.jit(lambda x: x + 2)(1.0)
assert len(kept()) > 0
assert gflow.cache_programs() == folder
print(folder)
"""


def test_programs_are_kept_in_the_users_folder_from_the_call_on(tmp_path):
    root = Path(gflow.__file__).parent.parent
    bare = {
        "PYTHONPATH": str(root),
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "caches"),
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=bare, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout and done.stdout.strip().endswith("gflow")


@pytest.mark.usefixtures("unchecked")
def test_a_folder_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`directory` is a int"):
        gflow.cache_programs(3)
