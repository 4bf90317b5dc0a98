"""Pictures: whether matplotlib can draw one and where it would go, a canvas without a screen, and writing it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_rt.errors import LoraRtError, UsageError
from lora_rt.registry.durable import check_writable

_SUFFIXES = (".png", ".svg", ".pdf")


class PlotError(LoraRtError):
    """The picture can't be drawn or written."""


def check_plot(path: Path, option: str = "--plot") -> None:
    """Before work of minutes: that its picture can be drawn and has a place. Imports nothing heavy.

    Args:
        path: where the picture is to go.
        option: what asked for it.

    Raises:
        UsageError: the path ends in what is not the name of a picture.
        PlotError: matplotlib is not installed, or the path can't be written.
        StorageError: its folder takes no file.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"{path} can't be written", next_step="Give a path that ends in .png, .svg or .pdf")
    if find_spec("matplotlib") is None:
        raise PlotError(f"{option} needs matplotlib", next_step="Install it with: pip install 'lora-rt[plot]'")
    if not path.absolute().parent.is_dir():
        raise PlotError(f"{path} can't be written: there is no folder {path.parent}", next_step="Make the folder first")
    if path.is_dir():
        raise PlotError(
            f"{path} can't be written: it is a folder", next_step=f"Give a file, as in {path / 'matrix.png'}"
        )
    check_writable(path.absolute().parent)


def canvas() -> Any:
    """matplotlib's pyplot, drawing into files alone."""
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write the picture and let go of it.

    Raises:
        PlotError: it can't be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        next_step = "Give a path that ends in .png, .svg or .pdf"
        raise PlotError(f"{path} can't be written: {error}", next_step=next_step) from error
    finally:
        canvas().close(figure)
