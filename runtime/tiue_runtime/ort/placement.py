"""Where the graphs of a bundle run: device, variant, precision and settings, decided by one function."""

import ctypes
import operator
import sys
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import SupportsIndex, cast

import numpy as np

from tiue_runtime.bundle import PORTABLE
from tiue_runtime.choices import Precision
from tiue_runtime.errors import BundleError, DeviceError, clip, shorten
from tiue_runtime.host import gpu, machine
from tiue_runtime.ort import sessions
from tiue_runtime.ort.devices import AUTO, KINDS, OWNED, Device, Settings, parse_device
from tiue_runtime.ort.interrupt import interruptible
from tiue_runtime.ort.sessions import first_line, installed_wheels, replace_wheels

MOST_THREADS = 4096
_COLLECTIONS = (tuple, list, set, frozenset, Mapping)  # of names; a string is none

# An ONNX model, y = Identity(x) on one float: the cheapest proof that a provider starts. A test rebuilds these bytes.
PROBE_MODEL = bytes.fromhex(
    "08083a3b0a100a017812017922084964656e74697479120570726f62655a0f0a0178120a0a08080112040a020801620f0a0179120a0a0808"
    "0112040a02080142040a001012"
)

# An ONNX model, y = a @ b on 16x16 floats: OpenVINO computes it in the requested precision, or in float32.
PRODUCT_MODEL = bytes.fromhex(
    "08083a590a110a01610a016212017922064d61744d756c120570726f62655a130a0161120e0a0c080112080a0208100a0208105a130a01"
    "62120e0a0c080112080a0208100a02081062130a0179120e0a0c080112080a0208100a02081042040a001012"
)


@dataclass(frozen=True)
class Placement:
    """Where and how the graphs of a bundle run. `place` makes it."""

    device: Device
    variant: str  # of the bundle
    settings: Settings  # of every session; a graph may add to them, for example a directory for compiled files

    @property
    def precision(self) -> Precision | None:
        """The proven precision of the device's arithmetic; None: the types of the graphs decide."""
        return self.settings.precision


def place(
    device: str = "auto",
    variants: Collection[str] = (PORTABLE,),
    *,
    variant: str | None = None,
    provider_options: Mapping[str, object] | None = None,
    precision: Precision | None = None,
    threads: int | None = None,
    cuda_graphs: bool = False,
) -> Placement:
    """Decide where graphs run, and prove that they can.

    Args:
        device: "cpu", "openvino", "cuda", "cuda:1" and so on, or "auto". A device by name is granted or refused.
            "auto" is the first of CUDA and OpenVINO on which a session starts, else the CPU. If ONNX Runtime was built
            for CUDA or OpenVINO and the CPU is chosen, a warning says why. "auto" skips devices that run none of the
            variants. It also skips OpenVINO if the CPU has no bf16 instructions and the bundle has "cpu" graphs, which
            are faster there.
        variants: the variants that the bundle holds.
        variant: one of them, or None for the best that runs on the device.
        provider_options: options of ONNX Runtime's provider. They override ours, and need a device by name.
        precision: "bf16" or "fp32", for devices with a choice. None is bf16 if the CPU has instructions for it, else
            fp32. A precision needs a device by name.
        threads: CPU threads of a session, from 1 to MOST_THREADS, or None for all that this process may use.
        cuda_graphs: whether runs are recorded. If "auto" chooses a device that cannot record, this is ignored.

    Returns:
        The device, with the settings of its sessions.

    Raises:
        BundleError: the bundle does not hold the variant.
        DeviceError: the device is absent or does not start, or a setting contradicts it. The message lists the
            available devices and the package to install.
    """
    _check_types(variants, provider_options, precision, threads, cuda_graphs)
    if variant is not None and (not isinstance(cast(object, variant), str) or variant not in tuple(variants)):
        raise BundleError(f"variant: expected one that the bundle holds ({_some(variants)}), got {shorten(variant)}")
    usable = tuple(variants) if variant is None else (variant,)
    settings = Settings({} if provider_options is None else provider_options, cuda_graphs, precision, threads)
    automatic = isinstance(cast(object, device), str) and device == "auto"
    if automatic:
        for name in ("provider_options", "precision"):
            if getattr(settings, name):
                raise DeviceError(f'{name}: expected the device that it is for, got device="auto"')
        chosen = _choose_any(usable)
        settings = replace(settings, cuda_graphs=cuda_graphs and chosen.row.cuda_graphs)
    else:
        chosen = parse_device(device)
    _check_settings(chosen, settings)
    runs = [name for name in chosen.row.variants if name in usable]
    if not runs:
        offered = f"the bundle holds only {_some(variants)}" if variant is None else f"got {variant!r}"
        *others, last = chosen.row.variants
        all_of_them = f"{', '.join(others)} or {last}" if others else last
        raise DeviceError(f"variant: {chosen} runs {all_of_them} graphs, {offered}")
    if not automatic:
        _grant(chosen, settings)
    return Placement(chosen, runs[0], _settle_precision(chosen, settings))


def _check_types(variants: object, options: object, precision: object, threads: object, cuda_graphs: object) -> None:
    """Raise DeviceError for arguments of `place` that are of another type, before anything is asked of them."""
    checks: tuple[tuple[str, object, bool, str], ...] = (
        ("variants", variants, _are_names(variants), "a tuple of names"),
        ("provider_options", options, options is None or isinstance(options, Mapping), "a dictionary or None"),
        ("precision", precision, precision is None or isinstance(precision, str), "a string or None"),
        ("cuda_graphs", cuda_graphs, isinstance(cuda_graphs, bool), "True or False"),
        (
            "threads",
            threads,
            threads is None or _is_count(threads),
            f"an integer from 1 to {MOST_THREADS}, or None for all CPUs",
        ),
    )
    for name, value, fits, expected in checks:
        if not fits:
            raise DeviceError(f"{name}: expected {expected}, got {shorten(value)}")


def _check_settings(device: Device, settings: Settings) -> None:
    """Raise DeviceError for settings that do not fit a device."""
    kind = device.row
    if settings.cuda_graphs and not kind.cuda_graphs:
        raise DeviceError(f"cuda_graphs: expected device={_kinds_with('cuda_graphs')}, got {device}")
    _check_precision(device, settings)
    if settings.provider_options and kind.options is None:
        raise DeviceError(f"provider_options: {device} has none, got {_some(settings.provider_options)}")
    for name in settings.provider_options:
        if name in OWNED:
            raise DeviceError(f"provider_options: {name} follows from {OWNED[name]}=, pass that instead")


def _check_precision(device: Device, settings: Settings) -> None:
    if device.row.takes_over(settings.provider_options):
        for name in ("precision", "threads"):
            if getattr(settings, name) is not None:
                raise DeviceError(f"{name}: follows from device_type and load_config of provider_options, pass either")
    if settings.precision is None:
        return
    precisions = device.row.precisions
    if not precisions:
        expected = f"device={_kinds_with('precisions')}"
        raise DeviceError(f"precision: expected {expected}, got {device}, which computes as graphs are written")
    if settings.precision not in precisions:
        expected = " or ".join(f'"{precision}"' for precision in precisions)
        raise DeviceError(
            f"precision: expected {expected}, or None for the best of the CPU, got {shorten(settings.precision)}"
        )


def _are_names(value: object) -> bool:
    return isinstance(value, _COLLECTIONS) and all(isinstance(name, str) for name in cast(Collection[object], value))


def _is_count(value: object) -> bool:
    try:
        return not isinstance(value, bool) and 1 <= operator.index(cast(SupportsIndex, value)) <= MOST_THREADS
    except Exception:  # A foreign object's conversion may raise anything.
        return False


def _kinds_with(name: str) -> str:
    """List the kinds of device whose field `name` is not empty."""
    return " or ".join(f'"{kind}"' for kind, row in KINDS.items() if getattr(row, name))


def _some(names: Collection[object]) -> str:
    return clip(", ".join(map(str, names)))


def _grant(device: Device, settings: Settings) -> None:
    """Raise DeviceError if a device that was requested by name is absent or does not start."""
    available = sessions.available_providers()
    if device.provider not in available:
        raise DeviceError(
            f"device: '{device}' needs {device.provider}, but the installed ONNX Runtime "
            f"({', '.join(installed_wheels()) or 'unknown wheel'}) has only {', '.join(available)}. "
            f"Replace it: {replace_wheels(device.row.extra)}"
        )
    problem = probe(device, settings.provider_options)
    if problem:
        raise DeviceError(f"device: '{device}' could not be started: {problem.rstrip('.')}. {device.row.remedy}.")


def _choose_any(variants: Collection[str]) -> Device:
    """Return the first device of AUTO that works and runs one of the variants, else the last."""
    available = sessions.available_providers()
    *others, last = map(Device, AUTO)
    for device in others:
        kind = device.row
        if kind.provider not in available or not any(name in variants for name in kind.variants):
            continue
        if kind.slower_than in variants and not machine.has_bf16():
            continue
        problem = probe(device)
        if not problem:
            return device
        warnings.warn(f"running on the CPU, because {kind.title} could not be started: {problem}", stacklevel=5)
    return last


def _settle_precision(device: Device, settings: Settings) -> Settings:
    """Fill in the precision of a device that has a choice, and prove it. Raises DeviceError.

    The default is bf16 if the CPU has instructions for it. On other CPUs, OpenVINO silently computes in float32 when
    bf16 is requested, so a proof is needed.
    """
    takes_over = device.row.takes_over(settings.provider_options)
    if not device.row.precisions or takes_over or settings.precision == "fp32":
        return settings
    asked = settings.precision == "bf16"
    granted = (asked or machine.has_bf16()) and _rounds(device, replace(settings, precision="bf16"))
    if asked and not granted:
        raise DeviceError(
            f"precision: {device.row.title} computes in float32 on this CPU, which has no instructions for bf16 "
            '(avx512_bf16, amx_bf16), got "bf16". Load with "fp32" or without'
        )
    return replace(settings, precision="bf16" if granted else "fp32")


def _rounds(device: Device, settings: Settings) -> bool:
    """Say whether a matrix product is rounded to bf16, which has 8 significant bits. Raises DeviceError."""
    try:
        start = partial(sessions.start_session, PRODUCT_MODEL, device, settings, must_take_all=device.row.must_take_all)
        session = interruptible(start, f"starting {device}")
        a, b = np.full((16, 16), 1 + 2**-10, dtype=np.float32), np.eye(16, dtype=np.float32)
        return bool((session.run(None, {"a": a, "b": b})[0] == 1).all())
    except Exception as error:  # ONNX Runtime's own exceptions share no other base
        raise DeviceError(f"precision: the precision of {device} cannot be tested: {first_line(error)}") from error


def probe(device: Device, options: Mapping[str, object] | None = None) -> str:
    """Test a device: start a session of one node on it.

    Returns:
        The problem, or "" if the device was granted.
    """
    try:
        settings = Settings(provider_options={**device.row.probe_options, **(options or {})})
        start = partial(sessions.start_session, PROBE_MODEL, device, settings)
        granted: list[str] = interruptible(start, f"starting {device}").get_providers()
    except Exception as error:  # The answer to any failure is its reason.
        return _with_reason(first_line(error), device)
    if granted[0] == device.provider:
        return ""
    return _with_reason(f"ONNX Runtime gave {', '.join(granted)} instead", device)


def _with_reason(problem: str, device: Device) -> str:
    """Add reasons that ONNX Runtime prints but does not raise: there is no GPU, or a library is missing."""
    gpus = gpu.find_gpus() if device.is_gpu else ""
    reasons = [gpus] if isinstance(gpus, str) and gpus else []
    name = device.row.library
    module = sys.modules.get("onnxruntime")
    if name and module is not None and module.__file__:
        for library in (f"lib{name}.so", f"{name}.dll"):
            path = Path(module.__file__).parent / "capi" / library
            try:
                if path.is_file():
                    ctypes.CDLL(str(path))
            except OSError as error:
                if "undefined symbol" not in str(error):  # Such symbols come from ONNX Runtime itself.
                    reasons.append(first_line(error))
    return f"{problem} ({'; '.join(reasons)})" if reasons else problem
