"""Which core runs: the compiled one, wherever there is one, or the plain file beside it.

Python prefers an extension module to a file of the same name. `SHARDEDFLIGHT_PURE` in the
environment, set to anything but `0`, asks for the file. So does a process whose threads are
greenlets (gevent, eventlet): who leads is known by the thread's ident, which the compiled core asks
C for, and only the patched `threading` knows those of greenlets. And so does a further interpreter
of the process, such as mod_wsgi runs applications in: what Cython makes is for one of them. This is
decided once, when the package is first imported, so this module has to be imported before any that
needs the core.
"""

import os
import sys
import threading
from importlib import import_module
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import BuiltinFunctionType

__all__ = ["compiled"]

_PACKAGE = __name__.rpartition(".")[0]
_CORE = f"{_PACKAGE}._core"


def _import_core() -> bool:
    """Imports the core that is asked for; returns whether it is compiled."""
    patched = not isinstance(threading.get_ident, BuiltinFunctionType)
    if patched or os.environ.get("SHARDEDFLIGHT_PURE", "") not in {"", "0"}:
        _import_plain()
    try:
        core = import_module(_CORE)
    except ImportError as error:
        if "interpreter" not in str(error):
            raise
        _import_plain()
        core = import_module(_CORE)
    return bool(core.compiled)


def _import_plain() -> None:
    """Imports the plain core, if Python would import an extension."""
    found = find_spec(_CORE)
    if found is not None and isinstance(found.loader, ExtensionFileLoader):
        _import_file(Path(found.loader.path).with_name("_core.py"))


def _import_file(path: Path) -> None:
    """Imports the plain core, as Python would if there were no extension."""
    spec = spec_from_file_location(_CORE, path)
    assert spec is not None
    assert spec.loader is not None
    core = module_from_spec(spec)
    sys.modules[_CORE] = core
    spec.loader.exec_module(core)
    vars(sys.modules[_PACKAGE])["_core"] = core


#: Whether the core that runs is the compiled one.
compiled = _import_core()
