"""From what a user types to a `Device`: an arch, a board's name, or a GPU of this machine.

`resolve_device` looks among live GPUs (`live`) first, for which CuPy is imported: a board that is at hand is the live
one. Naming a board needs neither CuPy nor a driver; `catalogue_device` doesn't look for them.
"""

from __future__ import annotations

import difflib
import re

from tilewright.kernels.catalogue import CATALOGUE, REFERENCE_BOARDS, normalise, supported_archs
from tilewright.kernels.device import Device
from tilewright.kernels.live import live_devices, probe
from tilewright.tuning_db.errors import MissingDependencyError, UnknownDeviceError, UsageError

_BOARDS = {device.board: device for device in CATALOGUE}

_ARCH = re.compile(r"(?:sm|compute)?_?(?:(\d{1,2})\.(\d)|(\d{2,3}))[af]?")
_LIVE = re.compile(r"cuda(?::(\d+))?")

_SPELLINGS = {
    normalise(spelling): device for device in CATALOGUE for spelling in (device.board, device.name, *device.aliases)
}


def resolve_device(name: str) -> Device:
    """The device that `name` means, live when it is at hand.

    Args:
        name: an arch (`sm_86`, `86`, `8.6`), which means a live GPU of that arch if there is one, else the arch's
            reference board; a board (`rtx3090`, `NVIDIA GeForce RTX 3090`); or a live GPU (`cuda`, `cuda:0`).

    Raises:
        UnknownDeviceError: nothing has that name, or the live GPU's arch is not in the catalogue.
        MissingDependencyError: a live GPU is asked for, and CuPy, the driver or the GPU is missing.
        UsageError: what is no text can't be a name.
    """
    if not isinstance(name, str):
        raise UsageError(f"{name=} must be the name of a device, such as 'sm_86', 'rtx3090' or 'cuda:0'")
    text = name.strip().lower()
    if match := _LIVE.fullmatch(text):
        return _live_device(int(match[1] or 0))
    if match := _ARCH.fullmatch(text):
        return _arch_device(int(match[3] or match[1] + match[2]))

    if text.startswith("cuda"):
        raise UnknownDeviceError(f"no GPU is called {name!r}: the first is cuda:0; `autotune devices` lists boards too")
    spelling = normalise(name)
    if known := _SPELLINGS.get(spelling):
        return next((device for device in live_devices() if device.key == known.key), known)
    for device in live_devices():
        if spelling in (normalise(device.board), normalise(device.name)):
            return device
    close = difflib.get_close_matches(spelling, _SPELLINGS, n=6, cutoff=0.5)
    boards = list(dict.fromkeys(_SPELLINGS[each].board for each in close))[:3]
    nearest = f"nearest: {', '.join(boards)}; " if boards else ""
    raise UnknownDeviceError(f"no device is called {name!r}; {nearest}list them with `autotune devices`")


def catalogue_device(board: str) -> Device:
    """The catalogue's device of a board, by its short name (`a100`), whether such a GPU is at hand or not.

    Raises:
        UnknownDeviceError: the catalogue has no board of that name.
    """
    if board not in _BOARDS:
        raise UnknownDeviceError(f"no board in the catalogue is called {board!r}")
    return _BOARDS[board]


def _arch_device(arch: int) -> Device:
    if arch not in REFERENCE_BOARDS:
        raise UnknownDeviceError(f"no board of sm_{arch} is in the catalogue; {supported_archs()}")
    reference = _BOARDS[REFERENCE_BOARDS[arch]]
    return next((device for device in live_devices() if device.arch == arch), reference)


def _live_device(index: int) -> Device:
    live = f"cuda:{index}"
    for device in live_devices():
        if device.live == live:
            return device
    found = probe()
    if index in found.skipped:
        raise UnknownDeviceError(found.skipped[index])
    if found.missing:
        raise MissingDependencyError(f"{live} needs {found.missing}; without a GPU, name a board or arch, as in sm_86")
    gpus = "1 GPU, cuda:0" if found.count == 1 else f"{found.count} GPUs, cuda:0 to cuda:{found.count - 1}"
    raise MissingDependencyError(f"there is no {live}: this machine shows {gpus}")
