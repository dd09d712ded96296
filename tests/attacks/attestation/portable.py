"""The harness's scripts with as much of an interpreter as they need, where every user can read it.

The interpreter that runs the tests may lie in a directory that is closed to other users; what attackers and victims execute must not.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    "wire.py",
    "puppet.py",
    "bystander.py",
    "victims.py",
    "credulous.py",
    "pid_rounds.py",
    "swarm.py",
    "hanging_files.py",
)
_NEEDED = "array,collections,contextlib,ctypes,encodings.ascii,encodings.idna,encodings.latin_1,json,pathlib,re,signal,socket,subprocess,threading"
_LIST = f"import sys,{_NEEDED}; print(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)), sep='\\n')"


def install(directory: Path) -> None:
    """Put scripts and library into ``directory``."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = directory / "lib" / version
    said = subprocess.run(
        [os.path.realpath("/proc/self/exe"), "-I", "-S", "-c", _LIST], capture_output=True, check=True, text=True
    )
    for source in map(Path, said.stdout.split()):
        _copy(source, library / str(source).rpartition(f"/{version}/")[2])
    shared = sysconfig.get_config_var("INSTSONAME") if sysconfig.get_config_var("Py_ENABLE_SHARED") else None
    if shared and (Path(sysconfig.get_config_var("LIBDIR")) / shared).exists():
        _copy(Path(sysconfig.get_config_var("LIBDIR")) / shared, directory / "lib" / shared)
    for script in SCRIPTS:
        _copy(HERE / script, directory / script)


def environment(directory: Path) -> dict[str, str]:
    """What a copy of the interpreter needs to find its library, whatever it is called and wherever it lies."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONHOME": str(directory),
        "LD_LIBRARY_PATH": str(directory / "lib"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)
