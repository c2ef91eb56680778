"""The C interface, for ctypes, cffi, Numba and whatever else calls C from a Python process."""

from pathlib import Path

from . import _core


def get_library() -> Path:
    """The shared library with the functions of `ssmcore/c_api.h`.

    It is the extension module itself, so it can be opened in a Python process only; other programs
    build and link the CMake target `ssmcore::ssmcore`.

        library = ctypes.CDLL(str(ssmcore.get_library()))
        library.ssmcore_version.restype = ctypes.c_char_p
        print(library.ssmcore_version().decode())
    """
    return Path(_core.__file__)
