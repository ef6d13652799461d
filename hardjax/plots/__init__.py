"""Pictures, drawn off screen from rows and records alone and returned as Matplotlib figures."""

import os

# Importing Matplotlib raises where MPLBACKEND names a backend that is not installed, as a notebook's does in the
# programs it starts. Nothing here opens a window, so the variable must not decide whether a picture can be drawn: it is
# out of the way while Matplotlib is first imported, then asked for as Matplotlib would have done.
_backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
if _backend:
    try:
        matplotlib.rcParams["backend"] = _backend
    except ValueError:
        matplotlib.rcParams["backend"] = "agg"
