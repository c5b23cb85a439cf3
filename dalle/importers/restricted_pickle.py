"""A pickle read as data: every name in it is looked up in a list, and what it costs is bounded before it is spent.

Nothing is imported, called or run. A name stands for an inert record or a plain container, and only the opcodes that
`torch.save` writes are read. Opcodes are counted, the memo is a dict, so that a large index costs nothing, and keys
are plain values: hashing a tuple that holds itself many times over would never end.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

MAX_OPCODES = 300_000  # of one pickle; a state dict of 3,000 tensors with its optimizer's has 200,000
MAX_PICKLE_BYTES = 2**24  # tensors lie outside the pickle
MAX_KEY = 4096  # characters of a name
MAX_GLOBAL = 160  # of a module's or a class's name
Lookup = Callable[
    [str, str], object | None
]  # a name in a pickle, as (module, name) -> its stand-in; None: refused


class Inert:
    """Stands for a named class or function: calling it keeps nothing and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        # defined so that unpickling never writes attributes of its choice
        raise ValueError(f"unexpected state for {type(self).__name__}")


class Opaque(Inert):
    """Stands for an object that nothing is read from, whatever is done to it."""

    def __new__(cls, *_: object) -> "Opaque":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        """Keep nothing."""


class Module(Inert):
    """A module of which only the attributes are kept, as data."""

    name = "Module"

    def __init__(self, *_: object) -> None:
        self.state: dict[str, Any] = {}

    def __new__(cls, *_: object) -> "Module":
        module = super().__new__(cls)
        module.state = {}  # unpickling skips __init__
        return module

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"the state of a module is {kind_of(state)}, not a dict")
        self.state = state


class TensorRecord(Inert):
    """The arguments of `torch._utils._rebuild_tensor_v2`: where in which storage a tensor lies."""

    def __init__(self, storage: object, offset: object, size: object, stride: object, *_: object) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


class Parameter(Inert):
    """The arguments of `torch._utils._rebuild_parameter`."""

    def __init__(self, tensor: object, *_: object) -> None:
        self.tensor = tensor


class Storage(NamedTuple):
    """A named run of numbers outside the pickle; a tuple, because a pickle cannot alter one."""

    key: str
    dtype: torch.dtype


def ordered_dict(*pairs: object) -> dict[Any, Any]:
    """Build what `OrderedDict(pairs)` is in a pickle: a dict; ValueError for keys that are not plain."""
    made: dict[Any, Any] = {}
    for group in pairs:
        if not isinstance(group, list | tuple):
            raise ValueError(f"an OrderedDict is made of {kind_of(group)}")
        for pair in group:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError("an OrderedDict is made of something other than pairs")
            made[plain_key(pair[0])] = pair[1]
    return made


def plain_set(*members: object) -> set[Any]:
    """Build what `set([...])` is in a pickle; ValueError for members that are not plain."""
    if len(members) > 1 or not all(isinstance(group, list | tuple) for group in members):
        raise ValueError("a set is made of something other than a list")
    return {plain_key(member) for group in members for member in group}  # type: ignore[attr-defined]


def plain_key(key: object) -> object:
    """Return a key whose hash takes no time; ValueError for tuples, which can double in size at every level."""
    if isinstance(key, str) and len(key) > MAX_KEY:
        raise ValueError(f"a name of {len(key)} characters; at most {MAX_KEY} are read")
    if key is None or isinstance(key, str | int | float | bool | type):
        return key
    raise ValueError(f"a dict whose key is {kind_of(key)}; only names and numbers are read")


# What every such pickle may name. It cannot alter types written in C; all others are the records above.
COMMON: dict[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor_v2"): TensorRecord,
    ("torch._utils", "_rebuild_parameter"): Parameter,
    ("torch", "device"): type("device", (Inert,), {}),
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
    ("collections", "OrderedDict"): ordered_dict,
}

# What `torch.save` writes by protocols 2 to 4; of the others, some allocate what the file only claims.
OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.SHORT_BINSTRING, pickle.BINSTRING, pickle.SHORT_BINBYTES, pickle.BINBYTES),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID),
)


class _Dispatch(dict[int, Callable[..., None]]):
    """The readers of opcodes; counts how many were read."""

    n_read = 0

    def __getitem__(self, opcode: int) -> Callable[..., None]:
        self.n_read += 1
        if self.n_read > MAX_OPCODES:
            raise ValueError(f"its pickle has more than {MAX_OPCODES:,} steps")
        return super().__getitem__(opcode)

    def __missing__(self, opcode: int) -> Callable[..., None]:
        raise ValueError(f"its pickle has opcode {opcode:#x}, which torch.save does not write")


class _Bounded:
    """A file from which one pickle is read: never more than it holds, nor more than a pickle may be."""

    def __init__(self, file: BinaryIO, n_bytes: int) -> None:
        self._file, self._left = file, min(n_bytes, MAX_PICKLE_BYTES)

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise ValueError("its pickle is cut short, or too long")
        self._left -= size
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(min(self._left, MAX_GLOBAL))
        if not line.endswith(b"\n"):
            raise ValueError("its pickle is cut short, or names something too long")
        self._left -= len(line)
        return line


class RestrictedUnpickler(pickle._Unpickler):
    """Unpickles into records and plain containers only; ValueError names whatever else a pickle asks for.

    The base is Python's own reader written in Python: the one in C allocates a memo as long as the largest index.
    """

    stack: list[Any]  # of the base
    pop_mark: Callable[[], list[Any]]  # of the base

    def __init__(self, file: BinaryIO, n_bytes: int, path: Path, lookup: Lookup, kind: str) -> None:
        super().__init__(_Bounded(file, n_bytes), encoding="utf-8")
        self.path, self.lookup, self.kind = path, lookup, kind
        self.storages: dict[str, Storage] = {}  # those that were referred to
        readers: dict[int, Any] = dict(pickle._Unpickler.dispatch)
        own = {
            pickle.SETITEM: type(self).read_item,
            pickle.SETITEMS: type(self).read_items,
            pickle.REDUCE: type(self).read_reduce,
            pickle.NEWOBJ: type(self).read_new,
            pickle.BUILD: type(self).read_build,
        }
        chosen = {code[0]: own.get(code, readers[code[0]]) for code in OPCODES}
        self.dispatch = _Dispatch(chosen)  # type: ignore[misc]

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up; ValueError for one that is not in the list."""
        found = COMMON.get((module, name)) or self.lookup(module, name)
        if len(module) + len(name) > 2 * MAX_GLOBAL or not (module + name).isprintable():
            raise ValueError("its pickle names something too long")
        if found is None:
            raise ValueError(f"{self.path} names {module}.{name}, which no {self.kind} does: refused")
        return found

    def persistent_load(self, reference: Any) -> Any:
        """Return the storage, or in the older format the class, that a reference means."""
        if isinstance(reference, tuple) and reference[:1] == ("module",) and len(reference) == 4:
            return reference[1]  # a class, already looked up above, and its source code, ignored
        if isinstance(reference, tuple) and reference[:1] == ("storage",) and len(reference) in (5, 6):
            _, dtype, key, _, _ = reference[:5]
            is_whole = len(reference) == 5 or reference[5] is None
            if isinstance(dtype, torch.dtype) and isinstance(key, str) and len(key) <= MAX_KEY and is_whole:
                return self.storages.setdefault(key, Storage(key, dtype))
        raise ValueError(f"{self.path} refers to outside data in a way that torch.save does not")

    def read_item(self) -> None:
        """Set one item of a dict."""
        key, value = self.stack[-2:]
        del self.stack[-2:]
        self._set(self.stack[-1], [key, value])

    def read_items(self) -> None:
        """Set the items of a dict above the last mark."""
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    def read_reduce(self) -> None:
        """Call what a name stands for; nothing else can be called."""
        arguments = self.stack.pop()
        self.stack[-1] = self._stand_in(self.stack[-1])(*arguments)

    def read_new(self) -> None:
        """Make an object of a class that a name stands for."""
        arguments = self.stack.pop()
        made = self._stand_in(self.stack[-1])
        self.stack[-1] = made.__new__(made, *arguments) if isinstance(made, type) else made(*arguments)

    def read_build(self) -> None:
        """Give an object its state; containers, whose only state is a version, keep none."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].__setstate__(state)

    @staticmethod
    def _set(target: object, items: list[Any]) -> None:
        if isinstance(target, Opaque):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"items are set in {kind_of(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[plain_key(key)] = value

    @staticmethod
    def _stand_in(called: Any) -> Any:
        if called is ordered_dict or called is plain_set:
            return called
        if isinstance(called, type) and issubclass(called, Inert):
            return called
        raise ValueError(f"{kind_of(called)} is called")


def kind_of(value: object) -> str:
    """Say what a value is, for an error line: its type alone, since printing it could take for ever."""
    return f"a {type(value).__name__}"
