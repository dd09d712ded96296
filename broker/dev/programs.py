"""Programs with a file of their own: a copy of the interpreter for each, so that the kernel can tell them apart.

The unix attestor knows a process by its user and by the file that it executes. Two Python programs execute the same file;
with a copy each they are as different as two compiled ones.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path


def install_program(directory: Path, name: str) -> Path:
    """Put a copy of this interpreter at ``directory/name/bin/name``; give its real path."""
    interpreter = Path("/proc/self/exe").resolve()
    home = directory / name
    target = home / "bin" / name
    target.parent.mkdir(parents=True)
    shutil.copyfile(interpreter, target)
    target.chmod(0o755)
    # Tells the copy where its standard library is (PEP 405).
    home.joinpath("pyvenv.cfg").write_text(f"home = {interpreter.parent}\ninclude-system-site-packages = false\n")
    return target.resolve()


def program_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Give the environment in which a copy finds the packages that this process has."""
    kept = {name: value for name, value in environ.items() if not name.startswith(("BROKER_", "PYTHON"))}
    standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    standard |= {f"{path}/lib-dynload" for path in standard}
    kept["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p and p not in standard and not p.endswith(".zip"))
    library = sysconfig.get_config_var("LIBDIR")
    if sysconfig.get_config_var("Py_ENABLE_SHARED") and library:
        kept["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (library, kept.get("LD_LIBRARY_PATH"))))
    return kept
