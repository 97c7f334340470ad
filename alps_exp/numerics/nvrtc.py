"""CUDA kernels compiled at run time by the compiler that comes with torch's CUDA libraries: no toolkit is needed."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

_SHARED_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SERIALIZATION_ATTRIBUTE = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id and a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class Kernel:
    """A kernel on one device.

    Args:
        source: CUDA C++ without includes; the kernel is `extern "C"`.
        name: of the kernel.
        defines: macros and their values.
        device: a CUDA device.
        shared: bytes of dynamic shared memory that a block may ask for.

    Raises:
        OSError: no compiler or driver.
        RuntimeError: it does not compile, or the device refuses it; in the compiler's words.
    """

    def __init__(self, source: str, name: str, defines: Mapping[str, int], device: torch.device, shared: int) -> None:
        self._device = device
        major, minor = torch.cuda.get_device_capability(device)
        options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17"]
        cubin = _compiled(source, (*options, *(f"-D{key}={value}" for key, value in sorted(defines.items()))))
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._start = _driver().cuLaunchKernelEx
        self._attribute = ctypes.pointer(_Attribute(id=_SERIALIZATION_ATTRIBUTE, value=1))
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # the context is there
            _check(_driver().cuModuleLoadData(ctypes.byref(self._module), cubin))
            _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))
            if shared > 48 * 1024:
                _check(_driver().cuFuncSetAttribute(self._function, _SHARED_ATTRIBUTE, shared))

    def __call__(
        self, blocks: int, threads: int, arguments: Sequence[Tensor | int | None], shared: int = 0, early: bool = False
    ) -> None:
        """Launch it on the current stream.

        Args:
            blocks: how many; 0 launches nothing.
            threads: of each.
            arguments: tensors on the device (None is a null pointer) and 32-bit integers.
            shared: bytes of dynamic shared memory of each block.
            early: it may start before the kernel before it has ended, for whose end it waits itself.
        """
        if not blocks:
            return
        held = [
            ctypes.c_int(item) if isinstance(item, int) else ctypes.c_void_p(None if item is None else item.data_ptr())
            for item in arguments
        ]
        pointers = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        launch = _Launch(blocks, 1, 1, threads, 1, 1, shared, stream, self._attribute, 1 if early else 0)
        if torch.cuda.current_device() == self._device.index:  # the usual case, without what a context takes
            _check(self._start(ctypes.byref(launch), self._function, pointers, None))
        else:
            with torch.cuda.device(self._device):
                _check(self._start(ctypes.byref(launch), self._function, pointers, None))


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _compiled(source: str, options: tuple[str, ...]) -> bytes:
    """Machine code."""
    nvrtc = ctypes.CDLL(f"libnvrtc.so.{(torch.version.cuda or '').split('.')[0]}")  # torch has loaded it
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"the kernel does not compile: {log.value.decode().strip()}")
        _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"CUDA error {status}")
