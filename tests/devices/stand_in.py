"""A stand-in accelerator called "desk", for machines that have none: CPU memory behind another name.

    from tests.devices.stand_in import Desk
    with Desk() as desk:  # Desk(float64=False) is a device like Apple's, without float64
        net = desk.put(net)  # parameters and buffers move
        y = net(x.to("desk"))  # an operation that mixes desk and CPU tensors raises, as on a GPU
        desk.waits  # [(operation, "file:line"), ...]: where the host had to wait for the device

What it shows: tensors made on the wrong device, values read back while a network runs, operations in float64
where there is none; forward and backward. What it does not show: streams, events, pinned memory, speed,
numerics, out of memory, and anything behind `device.type == "cuda"`. It is a test double, no proof: what runs
here must still run once on a real device. It uses an experimental interface of torch, so it needs a process
of its own: import it before the first backward pass, since autograd counts the devices once.
"""

from __future__ import annotations

import traceback
import warnings
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "desk"
WAITS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::_unique2",
}
WIDE = (torch.float64, torch.complex128)


class _State:
    float64 = True
    package = "torchlens_viz"
    waits: ClassVar[list[tuple[str, str]]] = []


def _note(operation: str) -> None:
    frames = [f for f in traceback.extract_stack() if f"/{_State.package}/" in f.filename]
    place = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else "the caller"
    _State.waits.append((operation, place))


class DeskTensor(torch.Tensor):
    """A tensor that says `desk:0` and holds a CPU tensor."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> DeskTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"{self.held!r} on {NAME}"

    def tolist(self) -> Any:
        _note("tolist")
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(
                f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
                "host memory first."
            )
        _note("numpy")
        return self.detach().held.numpy()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def record_stream(self, stream: Any) -> None:
        pass


def _is_desk(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, device = func._schema.name, kwargs.get("device")
    flat = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    ours = any(isinstance(a, DeskTensor) for a in flat)
    leaves = device is not None and not _is_desk(device)
    if ours and name in WAITS:
        _note(name)
    copies = name in ("aten::_to_copy", "aten::copy_")
    if (
        ours
        and not copies
        and not name.startswith(("aten::index", "aten::_index_put", "aten::_unsafe_index"))
    ):
        strange = [a for a in flat if not isinstance(a, DeskTensor) and a.ndim and a.numel()]
        if strange:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 "
                f"and cpu! ({name}, "
                f"{[tuple(a.shape) for a in strange]})"
            )
    to_host = (name == "aten::_to_copy" and ours and leaves) or (
        name == "aten::copy_" and ours and not isinstance(args[0], DeskTensor)
    )
    if to_host and not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])):
        _note(f"{name} to the host")
    stays = not leaves and (ours or _is_desk(device))
    if (
        stays
        and not _State.float64
        and (
            kwargs.get("dtype") in WIDE
            or (_is_desk(device) and kwargs.get("dtype") is None and any(a.dtype in WIDE for a in flat))
        )
    ):
        raise TypeError(
            f"Cannot convert a {NAME} Tensor to float64 dtype as the framework doesn't support float64. "
            "Please use float32 instead."
        )

    def plain(value: Any) -> Any:
        if isinstance(value, DeskTensor):
            return value.held
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value

    out = func(
        *tree_map(plain, args), **{k: v for k, v in tree_map(plain, kwargs).items() if k != "pin_memory"}
    )
    if name == "aten::copy_":
        return args[0]
    if not stays:
        return out
    known = {id(plain(a)): a for a in flat}
    return tree_map(
        lambda v: (known.get(id(v)) if id(v) in known else DeskTensor(v)) if type(v) is torch.Tensor else v,
        out,
    )


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Function(TorchFunctionMode):
    """What torch makes of Python lists and numbers, before any operation is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__getitem__" and args and isinstance(args[0], DeskTensor):
            move = lambda i: DeskTensor(torch.as_tensor(i)) if isinstance(i, list) else i  # noqa: E731
            args = (args[0], tuple(map(move, args[1])) if isinstance(args[1], tuple) else move(args[1]))
        if name in ("tensor", "as_tensor", "asarray") and _is_desk(kwargs.get("device")):
            kwargs.pop("device")
            if args and isinstance(args[0], DeskTensor):
                return args[0].to(kwargs.get("dtype") or args[0].dtype)
            made = func(*args, **kwargs)
            if not _State.float64 and made.dtype in WIDE:
                raise TypeError(
                    f"Cannot convert a {NAME} Tensor to float64 dtype as the framework doesn't support "
                    "float64."
                )
            return DeskTensor(made)
        return func(*args, **kwargs)


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    ours = [getattr(tensor, "held", tensor) for tensor in (source, target)]
    ours[1].copy_(ours[0])
    return target


_Generator = torch.Generator


class _IsGenerator(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _Generator)


class _AnyGenerator(metaclass=_IsGenerator):
    """`torch.Generator` that takes the desk for the host."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _Generator("cpu" if _is_desk(device) else device)


_library: torch.library.Library | None = None


def _register() -> None:
    global _library
    if _library is not None:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _library.impl(
            "empty_strided",
            lambda size, stride, dtype=None, **_: DeskTensor(torch.empty_strided(size, stride, dtype=dtype)),
            "PrivateUse1",
        )
        _library.impl("_copy_from", _copy_from, "PrivateUse1")
        _library.impl(
            "empty.memory_format",
            lambda size, dtype=None, **_: DeskTensor(torch.empty(size, dtype=dtype)),
            "PrivateUse1",
        )
    module = getattr(torch, NAME)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.is_available, module.device_count, module.current_device = (lambda: True), (lambda: 1), (lambda: 0)
    module.get_rng_state, module.set_rng_state = (lambda *a: torch.get_rng_state()), (lambda *a, **k: None)


_register()  # at import: autograd counts the devices once, at the first backward pass of a process


class Desk:
    """The device, within a `with` block. Import this module before the first backward pass of the process."""

    def __init__(self, *, float64: bool = True, package: str = "torchlens_viz") -> None:
        self._settings = (float64, package)

    def __enter__(self) -> Desk:
        _State.float64, _State.package = self._settings
        _State.waits.clear()
        self._modes = (_Function(), _Dispatch())
        torch.Generator = _AnyGenerator  # type: ignore[misc, assignment]
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.Generator = _Generator  # type: ignore[misc]
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    @property
    def waits(self) -> list[tuple[str, str]]:
        """Where the host waited for the device since the block began, or since `clear()`."""
        return list(_State.waits)

    def clear(self) -> None:
        _State.waits.clear()

    def put(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move parameters and buffers, and return the module."""
        for part in module.modules():
            for name, value in list(part._parameters.items()):
                if value is not None:
                    part._parameters[name] = torch.nn.Parameter(
                        DeskTensor(value.data), requires_grad=value.requires_grad
                    )
            for name, value in list(part._buffers.items()):
                if value is not None:
                    part._buffers[name] = DeskTensor(value)
        return module
