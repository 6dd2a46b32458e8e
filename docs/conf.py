"""How Sphinx builds the site: ``python run.py docs``."""

import ast
import importlib.metadata
import inspect
import textwrap
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from benchmarks import _report

project = "optax_nadam"
copyright = "the optax_nadam authors"
release = importlib.metadata.version(project)
extensions = [
    "matplotlib.sphinxext.plot_directive",
    "myst_parser",
    "sphinx-mathjax-offline",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
napoleon_attr_annotations = False
napoleon_use_ivar = True
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

nitpicky = True
# The documentation of other packages cannot be looked up without a network.
_NOT_HERE = r"(jax|np|numpy|optax)\..*|(.*\.)?(Any|ArrayLike|Callable|DTypeLike|Mapping|RuleName|Sequence)"
nitpick_ignore_regex = [("py:.*", _NOT_HERE)]

plot_formats = [("svg", 72)]
plot_html_show_formats = False
plot_html_show_source_link = False
plot_rcparams = {"font.size": 10, "svg.fonttype": "path"}

exclude_patterns = ["api/keras_methods.md"]  # a part of api/keras.rst

html_theme = "furo"
html_title = "optax_nadam"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]


def signature_as_written(app: Sphinx, what: str, name: str, obj: Any, *_: Any) -> tuple[str, str] | None:
    """The signature with its types as in the source, where Sphinx would expand every alias."""
    if what not in ("function", "method"):
        return None
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(obj))).body
    assert isinstance(definition, ast.FunctionDef)
    assert definition.returns
    definition.args.args = definition.args.args[what == "method" :]
    return f"({ast.unparse(definition.args)})", ast.unparse(definition.returns)


def write_benchmarks(app: Sphinx) -> None:
    """The page of benchmarks, from their results; git ignores it."""
    Path(app.srcdir, "benchmarks.md").write_text(_report.page())


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", write_benchmarks)
    app.connect("autodoc-process-signature", signature_as_written)
