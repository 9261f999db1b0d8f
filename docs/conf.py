"""Sphinx configuration. The build needs no network; `make docs` runs it."""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

from pyroflows import __version__  # noqa: E402

project = "pyroflows"
author = "The pyroflows developers"
copyright = author
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "myst_nb",
    "registry",
]
exclude_patterns = ["_build", "_generated", "_ext"]
default_role = "py:obj"
nitpicky = False  # Pyro, torch and typing are other sites, and a build does not fetch their inventories

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"Activation": "Activation"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a documented attribute is also a member: list it once

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_in_temp = True
nb_output_stderr = "remove"  # progress bars
nb_merge_streams = True

html_theme = "furo"
html_title = f"pyroflows {__version__}"
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"


def copy_tutorials(app):
    """The notebooks live at the top of the repository, and Sphinx reads below its own folder only."""
    shutil.rmtree(HERE / "tutorials", ignore_errors=True)
    shutil.copytree(HERE.parent / "tutorials", HERE / "tutorials", ignore=shutil.ignore_patterns(".*"))


def name_public_bases(app, name, obj, options, bases):
    """A private base is the reader's business only by what it derives from itself."""
    while private := [base for base in bases if getattr(base, "__name__", "").startswith("_")]:
        for base in private:
            at = bases.index(base)
            bases[at : at + 1] = base.__bases__


def setup(app):
    app.connect("builder-inited", copy_tutorials)
    app.connect("autodoc-process-bases", name_public_bases)
