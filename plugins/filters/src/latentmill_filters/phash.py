"""The perceptual hash of a picture, and which of many hashes are near one another."""

from __future__ import annotations

from collections.abc import Iterator
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
    the groups hang on no order: they are the connected components of a graph.
    """
    values, of = np.unique(hashes, return_inverse=True)
    pairs = [*near_pairs(values, distance)] or [np.empty((2, 0), np.intp)]
    a, b = np.concatenate(pairs, axis=1)
    _, group = connected_components(coo_array((np.ones(len(a), bool), (a, b)), shape=(len(values),) * 2))
    _, first, at = np.unique(group[of], return_index=True, return_inverse=True)
    return first[at]


def near_pairs(values: npt.NDArray[np.uint64], distance: int) -> Iterator[npt.NDArray[np.intp]]:
    """The pairs of places, ``[2, N]``, of distinct values that differ in ``distance`` bits or fewer; a pair may come several times.

    The 64 bits are cut into ``distance + k`` blocks. So few bits are in as many blocks at most, and k blocks at least are equal: for each
    choice of k blocks the values are sorted by them, and compared where those are equal (after Manku et al. 2007, "Detecting
    Near-Duplicates for Web Crawling").
    """
    k = 2 if distance <= 4 else 3
    blocks = [sum(1 << int(bit) for bit in block) for block in np.array_split(np.arange(64), distance + k)]
    for chosen in combinations(blocks, k) if distance else ():
        keys = values & np.uint64(sum(chosen))
        order = np.argsort(keys)
        keys = keys[order]
        left, step = np.arange(len(keys)), 1
        while True:  # each with the one that stands ``step`` behind it, as long as their keys are equal
            left = left[left + step < len(keys)]
            left = left[keys[left] == keys[left + step]]
            if not len(left):
                break
            pair = np.stack([order[left], order[left + step]])
            yield pair[:, np.bitwise_count(values[pair[0]] ^ values[pair[1]]) <= distance]
            step += 1
