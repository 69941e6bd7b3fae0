"""`SharedArray`: a published numpy array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy as np

    from shmx._core import SharedTensor

__all__ = ["SharedArray", "storable_array"]

# numpy's names of what torch knows by the same name; anything else travels as bytes.
_ALIKE = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
    | {"float16", "float32", "float64", "complex64", "complex128"}
)


def storable_array(array: np.ndarray[Any, Any]) -> bool:
    """Whether an array is made of bytes that mean the same in every process."""
    return not array.dtype.hasobject


class SharedArray:
    """A published numpy array: small, picklable, never the data itself.

    What :func:`shmx.wrap` puts in the place of a ``numpy.ndarray``, of any dtype that holds no Python objects. As
    :class:`SharedTensor` of its bytes, which it keeps in :attr:`tensor`; its copies and views are arrays.
    """

    __slots__ = ("__weakref__", "_dtype", "_shape", "tensor")

    def __init__(self, tensor: SharedTensor, dtype: Any = None, shape: tuple[int, ...] | None = None) -> None:
        """Take the handle; with `dtype` (of numpy) and `shape` its bytes are read as those."""
        self.tensor = tensor
        self._dtype = dtype
        self._shape = shape

    @staticmethod
    def stored(array: np.ndarray[Any, Any]) -> torch.Tensor:
        """Return the tensor of an array's memory, to be shared; a copy only if torch cannot step through it."""
        import numpy as np

        plain = array.dtype.name in _ALIKE and array.dtype.isnative
        if not plain or any(stride < 0 or stride % array.itemsize for stride in array.strides):
            array = np.ascontiguousarray(array)
        if not plain:
            array = array.reshape(-1).view(np.uint8)
        elif array.dtype.char in "qQ":
            # Another C type of the same size, which torch does not take.
            array = array.view(array.dtype.name)
        if not array.flags.writeable:
            array = np.asarray(_Writable(array))
        return torch.from_numpy(array)

    @classmethod
    def of(cls, tensor: SharedTensor, array: np.ndarray[Any, Any]) -> SharedArray:
        """Describe `array`, of which `tensor` is what :meth:`stored` returned."""
        if array.dtype.name in _ALIKE and array.dtype.isnative:
            return cls(tensor)
        return cls(tensor, array.dtype, array.shape)

    @classmethod
    def described(cls, tensor: SharedTensor, dtype: str, shape: Sequence[int]) -> SharedArray:
        """Describe an array by the ``str`` of its dtype; anything that is none raises ``TypeError``."""
        import numpy as np

        known = np.dtype(dtype)
        return cls(tensor) if known.name in _ALIKE and known.isnative else cls(tensor, known, tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return self.tensor.shape if self._shape is None else self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The ``numpy.dtype``."""
        import numpy as np

        return np.dtype(str(self.tensor.dtype).removeprefix("torch.") if self._dtype is None else self._dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.tensor.nbytes

    @property
    def is_available(self) -> bool:
        """Whether there is data."""
        return self.tensor.is_available

    @property
    def error(self) -> Exception | None:
        """Why there is none."""
        return self.tensor.error

    def view(self) -> np.ndarray[Any, Any]:
        """Zero-copy array of the shared pages; read-only by contract, and it keeps the block."""
        return self._array(self.tensor.view())

    def materialize(self, device: object = None) -> np.ndarray[Any, Any]:
        """Copy into an array that the caller owns, in memory of the CPU whatever `device` is."""
        return self._array(self.tensor.materialize())

    def release(self) -> None:
        """Give up the hold; idempotent."""
        self.tensor.release()

    def _array(self, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        array = tensor.numpy()
        return array if self._dtype is None else array.view(self._dtype).reshape(self._shape)

    def __array__(self, dtype: Any = None, *, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """As numpy's protocol says; a view unless a copy is needed."""
        import numpy as np

        return np.array(self.view(), dtype, copy=True) if copy else np.asarray(self.view(), dtype)

    def __len__(self) -> int:
        """The first size."""
        if not self.shape:
            raise TypeError("len() of a 0-d array")
        return self.shape[0]

    def __reduce__(self) -> tuple[Any, ...]:
        """The handle, and what numpy has to know."""
        return (SharedArray, (self.tensor, self._dtype, self._shape) if self._dtype is not None else (self.tensor,))

    def __repr__(self) -> str:
        """What it is, and whether there is data."""
        return f"SharedArray(shape {self.shape} {self.dtype}, {self.tensor!r})"


class _Writable:
    """Lets torch take the memory of a read-only array, which share only reads; torch would warn."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
