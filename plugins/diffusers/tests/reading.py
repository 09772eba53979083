"""Weights are read from their files once; who loads them again gets a copy of what was read, which nobody has touched."""

import functools
import io
import json
import pickle
from collections import OrderedDict
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType, NoneType

import torch

PLAIN = (NoneType, str, bool, int, float, torch.dtype)
SAID_ONLY = ("local_files_only", "low_cpu_mem_usage", "output_loading_info", "subfolder")
"""Options that change nothing of what is read out of a folder."""
SHARED = (FunctionType, BuiltinFunctionType, ModuleType, type, torch.dtype)


class Copies(pickle.Pickler):
    """What was read, to be made again without files: pickled, with its tensors and what is not data beside it."""

    def __init__(self, value):
        self.file, self.beside, self.places = io.BytesIO(), [], {}
        super().__init__(self.file)
        self.dump(value)

    def persistent_id(self, value):
        if not isinstance(value, (torch.Tensor, *SHARED)):
            return None
        if id(value) not in self.places:
            self.places[id(value)] = len(self.beside)
            self.beside.append(value)
        return self.places[id(value)]

    def one(self):
        """A copy that shares no tensor with others, and shares within itself what was shared."""
        copies = {}

        def beside(place):
            if place not in copies:
                value = self.beside[place]
                copies[place] = value if isinstance(value, SHARED) else _copy(value)
            return copies[place]

        unpickler = pickle.Unpickler(io.BytesIO(self.file.getbuffer()))
        unpickler.persistent_load = beside
        return unpickler.load()


def _copy(tensor):
    """In the memory format that it has. Nobody keeps gradients of what was only read."""
    copy = tensor.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(copy, tensor.requires_grad)
    return copy.requires_grad_(tensor.requires_grad)


def once(cls, patch, seen=lambda cls: None):
    """Have ``cls.from_pretrained`` read files once, wherever a folder links to them, as long as none of them changes.

    ``seen`` is told of what class a model is.
    """
    load, kept = cls.from_pretrained.__func__, OrderedDict()

    @functools.wraps(load)
    def from_pretrained(its, path, *positional, **options):
        folder = Path(path) / (options.get("subfolder") or "")
        if positional or not folder.is_dir() or not all(isinstance(value, PLAIN) for value in options.values()):
            return load(its, path, *positional, **options)
        files = [(file, file.stat()) for file in sorted(folder.iterdir())]
        key = its, meant(options, files), tuple((file.name, *_known_by(stat)) for file, stat in files)
        if key not in kept:
            kept[key] = Copies(load(its, path, **{**options, "output_loading_info": True}))
            if len(kept) > 100:
                kept.popitem(last=False)
        model, info = kept[key].one()
        seen(type(model))
        return (model, info) if options.get("output_loading_info") else model

    patch.setattr(cls, "from_pretrained", classmethod(from_pretrained))


def meant(options, files):
    """What of the options changes what is read: libraries say more, and ours others."""
    told = {name: value for name, value in options.items() if value not in (None, False) and name not in SAID_ONLY}
    told["dtype"] = told.pop("torch_dtype", told.get("dtype"))
    weights = [(file, *_known_by(stat)) for file, stat in files if file.suffix == ".safetensors"]
    if told["dtype"] is torch.float32 and weights and all(in_float32(*each) for each in weights):
        told["dtype"] = None  # as they are
    return tuple(sorted(told.items()))


@functools.lru_cache(1000)
def in_float32(path, *_known_by):
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {about["dtype"] for name, about in header.items() if name != "__metadata__"} <= {"F32", "I64"}


def _known_by(stat):
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
