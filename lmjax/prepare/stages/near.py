"""Near-duplicates across all sources: MinHash finds candidates, their true Jaccard index decides.

The pairs that are found depend on the texts and the seed alone, and on no shard or worker.

Shape legend: N records, G shingles, P permutations (bands x rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lmjax.errors import UserError, did_you_mean
from lmjax.prepare.stage import Result, judged, with_column
from lmjax.prepare.stages import words

# In a bucket of more records than this, each is compared with the first and with a few before it:
# pairs that are left out are of a crowd whose members join its group through others.
_CROWD, _FEW = 16, 4
_UNITS = {"words": words.normal_words, "characters": words.normal_characters}


@dataclass(frozen=True, kw_only=True)
class Near:
    """Drops, or marks, documents whose shingles are nearly those of an earlier one.

    Documents are near where the Jaccard index |A and B| / |A or B| of their sets of shingles is at
    least `threshold`; groups are the connected components; the first document of a group, in the
    order of records, stays. The column `group` of what is kept holds the id of its group's first.
    A document of fewer than `ngram` units is one shingle; one without letters is near to none.

    Source: MinHash, Broder (1997); bands of rows, Leskovec et al., Mining of Massive Datasets,
    section 3.4: a pair of Jaccard index s is a candidate with probability 1 - (1 - s^rows)^bands.

    Args:
      unit: what shingles are made of: "words", or "characters" of words and single spaces, both in
        lower case and without punctuation.
      ngram: units in a shingle.
      threshold: the least Jaccard index of near-duplicates.
      bands: how often a pair may become a candidate.
      rows: minima that must agree for that.
      mode: "drop"; or "mark", which keeps all documents and writes their groups.
      seed: of the permutations.
    """

    unit: Literal["words", "characters"] = "words"
    ngram: int = 5
    threshold: float = 0.8
    bands: int = 20
    rows: int = 6
    mode: Literal["drop", "mark"] = "drop"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.unit not in _UNITS:
            raise UserError(f"unit={self.unit!r}." + did_you_mean(self.unit, _UNITS))
        if self.mode not in ("drop", "mark"):
            raise UserError(f"mode={self.mode!r}." + did_you_mean(self.mode, ("drop", "mark")))
        if not 0 < self.threshold <= 1 or min(self.ngram, self.bands, self.rows) < 1:
            raise UserError(
                f"threshold={self.threshold} must lie in (0, 1], and ngram={self.ngram}, "
                f"bands={self.bands} and rows={self.rows} be positive."
            )

    def keys(self, records: pa.Table) -> pa.Table:
        """A row for each band of each record; equal `digest` says equal lists of shingles."""
        texts = records["text"].to_pylist()
        keys, digests, found = [], [], []
        for piece in words.chunks(texts):
            hashes_G, offsets = self._shingles(texts[piece])
            full = np.flatnonzero(np.diff(offsets))
            found.append(full + piece.start)
            if len(full):
                keys.append(self._bands(hashes_G, offsets[:-1][full]))
                digests.append(np.add.reduceat(hashes_G, offsets[:-1][full]))
        rows = np.concatenate([np.zeros(0, np.int64), *found])
        keys_NB = np.concatenate([np.zeros((0, self.bands), np.uint64), *keys])
        digests_N = np.concatenate([np.zeros(0, np.uint64), *digests])
        at = pa.array(np.repeat(rows, self.bands))
        return pa.table(
            {
                "key": keys_NB.reshape(-1),
                "id": records["id"].combine_chunks().take(at),
                "order": records["order"].combine_chunks().take(at),
                "digest": np.repeat(digests_N, self.bands),
            }
        )

    def reduce(self, rows: pa.Table) -> pa.Table:
        """Candidates: for both records of each pair, a row with the `pair`'s own key.

        Records of one digest are paired with their first alone, as the `same`.
        """
        keys, orders, digests = (rows[n].to_numpy() for n in ("key", "order", "digest"))
        sort = np.lexsort((orders, digests, keys))
        again = np.zeros(len(sort), bool)
        again[1:] = (np.diff(keys[sort]) == 0) & (np.diff(digests[sort]) == 0)
        heads = sort[np.maximum.accumulate(np.where(again, 0, np.arange(len(sort))))]
        pairs = [np.stack([heads[again], sort[again]])]
        num_same = pairs[0].shape[1]
        single = np.sort(sort[~again])  # in the order that rows came in: (key, order)
        bucket = keys[single]
        new = np.ones(len(single), bool)
        new[1:] = bucket[1:] != bucket[:-1]
        first = np.maximum.accumulate(np.where(new, np.arange(len(single)), 0))
        rank = np.arange(len(single)) - first
        crowded = np.bincount(first, minlength=len(single))[first] > _CROWD
        far = np.flatnonzero(crowded & (rank > _FEW))
        pairs.append(np.stack([single[first[far]], single[far]]))
        for lag in range(1, _CROWD):
            at = np.flatnonzero((rank >= lag) & (~crowded | (lag <= _FEW)))
            pairs.append(np.stack([single[at - lag], single[at]]))
        left, right = np.concatenate(pairs, axis=1)
        same = np.arange(len(left)) < num_same
        pair = _pair_keys(orders[left], orders[right])
        # A pair is as a rule a candidate of several bands of the rows at hand.
        _, once = np.unique(pair, return_index=True)
        both = pa.array(np.concatenate([left[once], right[once]]))
        return pa.table(
            {
                "id": rows["id"].take(both),
                "order": rows["order"].take(both),
                "pair": np.tile(pair[once], 2),
                "same": np.tile(same[once], 2),
            }
        )

    def evidence(self, records: pa.Table, decisions: pa.Table) -> pa.Table:
        """The sorted set of shingles of each candidate, once for each of its pairs."""
        decisions = decisions.combine_chunks()
        pairs, orders = decisions["pair"].to_numpy(), decisions["order"].to_numpy()
        _, once = np.unique(np.stack([orders, pairs.view(np.int64)]), axis=1, return_index=True)
        decisions = decisions.take(pa.array(once))
        ids = records["id"].combine_chunks()
        needed = pc.unique(decisions.filter(pc.invert(decisions["same"]))["id"])
        taken = records.filter(pc.is_in(ids, needed.cast(ids.type)))
        texts = taken["text"].to_pylist()
        sets: list[np.ndarray] = []
        for piece in words.chunks(texts):
            hashes_G, offsets = self._shingles(texts[piece])
            sets += [np.unique(part) for part in np.split(hashes_G, offsets[1:-1])]
        bounds = np.cumsum([0, *map(len, sets)])
        flat = np.concatenate([np.zeros(0, np.uint64), *sets])
        lists = pa.LargeListArray.from_arrays(pa.array(bounds, pa.int64()), pa.array(flat))
        at = pc.index_in(decisions["id"], taken["id"].combine_chunks().cast(pa.string()))
        at = pc.if_else(decisions["same"], pa.scalar(None, pa.int32()), at)
        return pa.table(
            {
                "key": decisions["pair"],
                "id": decisions["id"],
                "order": decisions["order"],
                "same": decisions["same"],
                "shingles": lists.take(at.combine_chunks()),
            }
        )

    def verify(self, rows: pa.Table) -> pa.Table:
        """Near pairs: the later record's `id` and `order`, the `other`'s, and their `jaccard`."""
        rows = rows.combine_chunks()
        keys = rows["key"].to_numpy()
        right = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        same = rows["same"].to_numpy(zero_copy_only=False)
        lists = rows["shingles"].chunk(0) if len(rows) else pa.array([], pa.large_list(pa.uint64()))
        bounds, flat = lists.offsets.to_numpy(), lists.values.to_numpy()
        # pairs that are the same in one band are the same: a record's digest has one value
        jaccard = np.ones(len(right))
        for at in np.flatnonzero(~same[right]):
            i = int(right[at])
            a, b = flat[bounds[i - 1] : bounds[i]], flat[bounds[i] : bounds[i + 1]]
            shared = len(a) + len(b) - len(np.union1d(a, b))
            jaccard[at] = shared / (len(a) + len(b) - shared)
        near = jaccard >= self.threshold
        later, earlier = pa.array(right[near]), pa.array(right[near] - 1)
        return pa.table(
            {
                "id": rows["id"].take(later),
                "order": rows["order"].take(later),
                "other": rows["id"].take(earlier),
                "other_order": rows["order"].take(earlier),
                "jaccard": jaccard[near],
            }
        )

    def settle(self, decisions: pa.Table) -> pa.Table:
        """Groups: each member's `group`, the id of its first, and its nearest earlier member."""
        both = [decisions[name].to_numpy() for name in ("order", "other_order")]
        nodes, where = np.unique(np.concatenate(both), return_index=True)
        later, earlier = (np.searchsorted(nodes, orders) for orders in both)
        root = _roots(later, earlier, len(nodes))
        # The nearest earlier member: of the largest index, and of those the first.
        index = decisions["jaccard"].to_numpy()
        sort = np.lexsort((earlier, -index, later))
        first = np.ones(len(sort), bool)
        first[1:] = np.diff(later[sort]) != 0
        best = sort[first]
        other = np.full(len(nodes), -1, np.int64)
        other[later[best]] = earlier[best]
        near = np.zeros(len(nodes))
        near[later[best]] = index[best]
        chunks = [chunk for name in ("id", "other") for chunk in decisions[name].chunks]
        names = pa.chunked_array(chunks, pa.string()).take(pa.array(where))
        alone = pa.array(other < 0)
        null = pa.scalar(None, pa.int64())
        return pa.table(
            {
                "id": names,
                "order": nodes,
                "group": names.take(pa.array(root)),
                "other": names.take(pc.if_else(alone, null, pa.array(other))),
                "jaccard": pc.if_else(alone, pa.scalar(None, pa.float64()), pa.array(near)),
            }
        )

    def decide(self, records: pa.Table, decisions: pa.Table) -> Result:
        """Adds `group`; drops all but the first of each group where the mode says so."""
        ids = records["id"].combine_chunks()
        at = pc.index_in(ids, decisions["id"].combine_chunks().cast(ids.type))
        group = pc.coalesce(decisions["group"].combine_chunks().take(at), ids)
        records = with_column(records, "group", group)
        follows = pc.not_equal(group, ids)
        counts = {"near-duplicates": pc.sum(follows).as_py() or 0}
        if self.mode == "mark":
            return Result(kept=records, counts=counts)
        reasons = pc.if_else(follows, "near-duplicate", pa.scalar(None, pa.string()))
        details: list[str | None] = [None] * len(ids)
        found = decisions.take(at.filter(follows))
        for row, kept, other, index in zip(
            np.flatnonzero(follows.to_numpy(zero_copy_only=False)).tolist(),
            found["group"].to_pylist(),
            found["other"].to_pylist(),
            found["jaccard"].to_pylist(),
            strict=True,
        ):
            through = "" if other is None else f" (Jaccard {index:.3f} with {other})"
            details[row] = f"{kept}{through}"
        return judged(records, reasons, details=details, counts=counts)

    def _shingles(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of each text's shingles, and their offsets; a short text's is all of it."""
        units = _UNITS[self.unit](texts)
        sizes = np.diff(units.offsets_N1)
        hashes, offsets = words.ngrams(units.hashes_W, units.offsets_N1, self.ngram)
        short = np.flatnonzero((sizes > 0) & (sizes < self.ngram))
        if not len(short):
            return hashes, offsets
        whole = np.zeros(len(short), np.uint64)
        for i, text in enumerate(short):
            part = units.hashes_W[units.offsets_N1[text] : units.offsets_N1[text + 1]]
            whole[i] = words.ngrams(part, np.array([0, len(part)]), len(part))[0][0]
        hashes = np.insert(hashes, offsets[short], whole)
        counts = np.diff(offsets)
        counts[short] = 1
        return hashes, np.concatenate([[0], np.cumsum(counts)])

    def _bands(self, hashes_G: np.ndarray, starts_N: np.ndarray) -> np.ndarray:
        """A key for each record and band: a hash of the band's number and of its minima."""
        random = np.random.default_rng(self.seed)
        shape = (self.bands, self.rows)
        factors = random.integers(0, 1 << 32, shape, np.uint32) | np.uint32(1)
        terms = random.integers(0, 1 << 32, shape, np.uint32)
        high = (hashes_G >> np.uint64(32)).astype(np.uint32)
        permuted = np.empty_like(high)
        keys = np.empty((len(starts_N), self.bands), np.uint64)
        for band in range(self.bands):
            key = np.full(len(starts_N), band + 1, np.uint64)
            for row in range(self.rows):
                np.multiply(high, factors[band, row], out=permuted)
                permuted += terms[band, row]
                key = words.mix(key ^ np.minimum.reduceat(permuted, starts_N))
            keys[:, band] = key
        return keys


def _roots(left: np.ndarray, right: np.ndarray, size: int) -> np.ndarray:
    """The least node of each node's connected component, given the ends of all edges."""
    root = np.arange(size)
    while True:
        ends = root[left], root[right]
        low, high = np.minimum(*ends), np.maximum(*ends)
        apart = low != high
        if not apart.any():
            return root
        np.minimum.at(root, high[apart], low[apart])
        while not np.array_equal(higher := root[root], root):
            root = higher


def _pair_keys(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    mixed = words.mix(first.astype(np.uint64) + np.uint64(1))
    return words.mix(mixed ^ second.astype(np.uint64))
