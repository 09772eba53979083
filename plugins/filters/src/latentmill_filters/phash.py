"""The perceptual hash of a picture, and which of many hashes are near one another."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.fft import dct
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MAX_DISTANCE = 8
"""Beyond, groups of pictures have little in common, and the search takes long."""


def phash(picture: npt.NDArray[np.uint8]) -> str:
    """The perceptual hash of a picture ``[H, W, 3]``, 16 hex digits: ``str(imagehash.phash(picture))`` of the library ImageHash.

    The picture in grey (ITU-R 601-2 luma), scaled to 32 x 32 pixels (Lanczos), its cosine transform (type II, unscaled) down and then
    across, and of that the 8 x 8 lowest frequencies, row by row: a bit is 1 where one is above the median of the 64. After Krawetz,
    "Looks Like It" (hackerfactor.com, 2011), and Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010).
    """
    grey = Image.fromarray(picture).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    low = dct(dct(np.asarray(grey, np.float64), axis=0), axis=1)[:8, :8]
    return np.packbits(low > np.median(low)).tobytes().hex()


def as_numbers(hashes: list[str]) -> npt.NDArray[np.uint64]:
    """Hashes of 16 hex digits as numbers of 64 bits."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), ">u8").astype(np.uint64)


def firsts(hashes: npt.NDArray[np.uint64], distance: int) -> npt.NDArray[np.intp]:
    """For each hash the place of the first of its group: itself, if no other of the group stands before it.

    Two hashes are of one group if they differ in ``distance`` bits or fewer, or if a chain of such pairs leads from one to the other. So
    the groups hang on no order: they are the connected components of a graph. Memory is of the order of the hashes, however near they are.

    The 64 bits are cut into ``distance + k`` blocks. So few bits are in as many blocks at most, and k blocks at least are equal: for each
    choice of k blocks those are compared that are equal there (after Manku et al. 2007, "Detecting Near-Duplicates for Web Crawling").
    """
    values, of = np.unique(hashes, return_inverse=True)
    group = np.arange(len(values))
    k = 2 if distance <= 4 else 3
    blocks = [sum(1 << int(bit) for bit in block) for block in np.array_split(np.arange(64), distance + k)]
    for chosen in combinations(blocks, k) if distance and len(values) else ():
        group = _joined(group, values, values & np.uint64(sum(chosen)), distance)
    _, first, at = np.unique(group[of], return_index=True, return_inverse=True)
    return first[at]


def _joined(
    group: npt.NDArray[np.intp], values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], distance: int
) -> npt.NDArray[np.intp]:
    """The values' groups, those made one that have near values of equal keys.

    The values are sorted by key and group, and each is compared with those of its key behind its own group: the nearest, then the next,
    and so on. After some steps they are sorted anew, since what was joined by then needs no comparing; each time more steps follow.
    """
    rest, steps = np.argsort(keys), 8
    equal = np.append(False, keys[rest][1:] == keys[rest][:-1])
    rest = rest[equal | np.append(equal[1:], False)]
    while len(rest):
        rest = rest[np.lexsort((group[rest], keys[rest]))]
        key, its = keys[rest], group[rest]
        ends = np.append(np.flatnonzero((key[1:] != key[:-1]) | (its[1:] != its[:-1])) + 1, len(rest))
        left, right = np.arange(len(rest)), np.repeat(ends, np.diff(ends, prepend=0))
        for _ in range(steps):
            left, right = left[right < len(rest)], right[right < len(rest)]
            equal = key[left] == key[right]
            left, right = left[equal], right[equal]
            if not len(left):
                break
            a, b = rest[left], rest[right]
            near = (group[a] != group[b]) & (np.bitwise_count(values[a] ^ values[b]) <= distance)
            group = _folded(group, group[a[near]], group[b[near]])
            right = right + 1
        rest, steps = rest[np.isin(key, key[left])], 2 * steps
    return group


def _folded(group: npt.NDArray[np.intp], a: npt.NDArray[np.intp], b: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Groups by number, of which each of ``a`` has become one with that of ``b``."""
    if not len(a):
        return group
    numbers, at = np.unique(np.concatenate([a, b]), return_inverse=True)
    links = coo_array((np.ones(len(a), bool), at.reshape(2, -1)), shape=(len(numbers),) * 2)
    _, component = connected_components(links, directed=False)
    _, first = np.unique(component, return_index=True)
    became = np.arange(len(group))
    became[numbers] = numbers[first[component]]
    found: npt.NDArray[np.intp] = became[group]
    return found
