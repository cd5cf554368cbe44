"""Each notebook is a test: its cells run one after the other, in the process of the other tests.

A kernel of its own would import everything once more, and trace and compile again what other
notebooks have. Settings of JAX that the tests have made strict are as users have them.
"""

import ast
import json
import linecache

import pytest

collect_ignore = ["conftest.py"]  # there is another of that name, and doctests are in neither


def pytest_collect_file(parent, file_path):
    """Notebooks are files of tests."""
    if file_path.suffix == ".ipynb":
        return NotebookFile.from_parent(parent, path=file_path)
    return None


class NotebookFile(pytest.File):
    """A notebook, which is one test."""

    def collect(self):
        yield Notebook.from_parent(self, name=self.path.stem)


class Notebook(pytest.Item):
    """The cells with code, from the first to the last."""

    def runtest(self):
        import matplotlib.pyplot as plt
        import users

        cells = json.loads(self.path.read_text(encoding="utf-8"))["cells"]
        codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        assert codes
        # What a notebook defines is sent to other processes as a kernel would send it.
        names = {"__name__": "__main__"}
        with users.settings(self.path.parent), pytest.MonkeyPatch.context() as patch:
            patch.setattr(plt, "show", draw)
            for number, code in enumerate(codes, start=1):
                run(code, names, f"{self.path.name}, cell {number}")

    def reportinfo(self):
        return self.path, None, self.name


def run(code, names, place):
    """Run a cell; what its last line gives is shown, and so are the figures that it leaves."""
    # So that a traceback shows the lines of the cell.
    linecache.cache[place] = (len(code), None, code.splitlines(keepends=True), place)
    tree = ast.parse(code, place)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, place, "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), place, "eval"), names)
        repr(value)
        if hasattr(value, "_repr_html_"):
            value._repr_html_()
    draw()


def draw(*_, **__):
    """Draw the open figures and close them, as a notebook does."""
    import matplotlib.pyplot as plt

    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")
