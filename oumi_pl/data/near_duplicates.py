"""Near duplicates: rows that share runs of 13 words with other rows of a split, or with training rows.

The *13-grams* of a text are the runs of 13 words in it, without case, punctuation and white space, as in appendix C of
GPT-3 (Brown et al. 2020, arXiv:2005.14165). A shorter text has one, all of its words. In scripts without spaces between
words, such as Chinese or Thai, each character counts as a word, so that 13 of them are 4 to 8 real words. Two questions
are answered, both exactly:

- Which rows of a split are near duplicates? Two rows are if the 13-grams that both have are at least half of those that
  either has (a Jaccard index of 0.5). One changed word changes 13 of them, so that this is about as strict as 0.8 of
  5-grams, which Lee et al. (arXiv:2107.06499) use. A row is counted if it is near one before it that is not counted.
- Which held-out rows have text that is in training? Those with a 13-gram of a training row. As in GPT-3, a 13-gram that
  more than 10 training rows have is a common phrase, such as the instruction of a prompt, and doesn't count, unless the
  row has no others: then all of its text is in training.

Pairs with a Jaccard index of 0.5 are found without comparing all of them, by prefix filtering (Bayardo, Ma and Srikant
2007, Xiao et al. 2008): with the 13-grams of all rows in one order, two such rows share one of the first half. In an
order that begins with the rarest 13-grams, most rows have none to look up, and the text of a template comes last. The
time is quadratic only if most rows consist of 13-grams that many rows have in different combinations. MinHash, which is
usual for this, finds most of the pairs, and would need the 13-grams as well, to tell them from others.
"""

import hashlib
import json
import re
import tempfile
import unicodedata
import zlib
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import regex

from oumi_pl.data.duplicates import LISTED, Keyed, Places
from oumi_pl.data.splitting import content_hash
from oumi_pl.data.store import cache_key, cache_root, own_code
from oumi_pl.runs import files
from oumi_pl.runs.folders import remove_abandoned
from oumi_pl.terminal.screen import track

WORDS = 13
"""Words of a gram."""
COMMON = 10
"""Most training rows that may have a gram before it counts as a common phrase."""
BLOCK = 4096
"""Rows that are counted at once."""
LARGEST_TABLE = 28
"""Bits of the largest table of counts of grams, which takes 512 MiB."""

# scripts without spaces between words: each character is one, with its marks
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# marks, such as the vowels of Hindi, are part of a word for `regex`, but not for `re`, which is four times as fast
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[^\W{_UNSPACED}]+")
_WORD_WITHOUT_MARKS = re.compile(r"\w+")
# characters of scripts besides Latin, Greek and Cyrillic, marks, and joiners
_OTHERS = re.compile("[\u0300-\u036f\u0483-\u0489\u0590-\u1dff\u200c\u200d\u20d0-\u20ff\u2c00-\U0010ffff]")
_FACTOR = 0x9E3779B97F4A7C13  # odd, and 3 modulo 8, so that its powers differ in the low bits
_MOST_WORDS = 1_000_000  # whose hashes are remembered


class RowTexts(NamedTuple):
    """The rows of a source, with their texts.

    name: identifies the rows, as part of the cache's key. rows: their keys. texts: starts an iterator over the number
    of each row, counted from 0, and its text; rows that occur several times may be left out. title: of the source.
    """

    name: str
    rows: Keyed
    texts: Callable[[], Iterable[tuple[int, str]]]
    title: str


def name_of(rows: Keyed, *others: Any) -> str:
    """A name of rows by what they say, and by what else their texts depend on."""
    return cache_key(hashlib.blake2b(rows.record_keys.tobytes(), digest_size=16).hexdigest(), *others)


def with_near_duplicates(
    described: dict[str, Any],
    reports: Sequence[dict[str, Any]],
    sources: Sequence[RowTexts],
    training: Sequence[RowTexts] | None,
) -> dict[str, Any]:
    """Adds near duplicates to what `describe_repeated` returned.

    Args:
        described: What is known of repeated rows.
        reports: The report of each source.
        sources: The rows of each source of the split.
        training: Those of the training split; None if this is it, or if it is not used.

    Returns:
        Also `near_duplicates` (`rows`, and the `first` of them, each with the row that it is near), and of a held-out
        split `text_in_training` (`rows`, how many of these have `half` of their 13-grams in training, and the `first`
        of them, each with a training row; all without common phrases), whose number of rows each of several sources has
        too.
    """
    counts = _counted(sources, training)
    place = Places([source.rows for source in sources])
    near = counts["near"]
    first = [[place(row)[1], place(earlier)[1]] for row, earlier in near["first"]]
    described = described | {"near_duplicates": {"rows": near["rows"], "first": first}}
    if training is None:
        return described
    of_training, parts = Places([source.rows for source in training]), counts["in_training"]
    pairs = ((source, pair) for source, part in zip(sources, parts, strict=True) for pair in part["first"])
    described["text_in_training"] = {
        "rows": sum(part["rows"] for part in parts),
        "half": sum(part["half"] for part in parts),
        "first": [[source.rows.origins[row], of_training(other)[1]] for source, (row, other) in islice(pairs, LISTED)],
    }
    if len(sources) > 1:
        of_sources = zip(described.get("sources", reports), parts, strict=True)
        described["sources"] = [report | {"text_in_training": part["rows"]} for report, part in of_sources]
    return described


def _counted(sources: Sequence[RowTexts], training: Sequence[RowTexts] | None) -> dict[str, Any]:
    """The counts of a split, with numbers of rows; from the cache, or counted now."""
    names = [None if rows is None else [source.name for source in rows] for rows in (sources, training)]
    file = cache_root() / "near_duplicates" / f"{cache_key(*names, WORDS, COMMON, own_code())}.json"
    try:
        cached = json.loads(file.read_bytes())
        if cached["crc32"] == zlib.crc32(json.dumps(cached["counts"]).encode()):
            return dict(cached["counts"])
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # none, or a damaged one
        pass
    counts: dict[str, Any] = {}
    of_sources = [Grams(source) for source in sources]
    near = near_duplicates(_numbered(sources, of_sources))
    counts["near"] = {"rows": len(near), "first": near[:LISTED]}
    if training is not None:
        counts["in_training"] = text_in_training(of_sources, _numbered(training, map(Grams, training)))
    file.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(file.parent)
    files.write(file, json.dumps({"crc32": zlib.crc32(json.dumps(counts).encode()), "counts": counts}))
    return counts


def grams_of(text: str) -> np.ndarray:
    """Hashes of the 13-grams of a text, `[grams]` uint64, ascending, each once; empty if it has no word."""
    words = _words(text)
    hashes = np.fromiter(map(_word_hashes.__getitem__, words), np.uint64, len(words))
    size = min(WORDS, len(words))
    rolling = np.full(len(words) - size + 1, size, np.uint64)
    for i in range(size):
        rolling = rolling * np.uint64(_FACTOR) + hashes[i : len(words) - size + 1 + i]
    # spread over all bits, since a table is indexed by the highest ones
    rolling ^= rolling >> np.uint64(31)
    rolling *= np.uint64(0xBF58476D1CE4E5B9)
    rolling ^= rolling >> np.uint64(29)
    return np.unique(rolling) if words else np.empty(0, np.uint64)


def _words(text: str) -> list[str]:
    # the same text may be written with composed or with combining characters; case folding can take them apart again
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return (_WORD if _OTHERS.search(folded) else _WORD_WITHOUT_MARKS).findall(folded)


class _WordHashes(dict[str, int]):
    """Hashes of words, 64 bits, the same in every process."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MOST_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
        self[word] = value = int.from_bytes(digest, "little")
        return value


_word_hashes = _WordHashes()


class Grams:
    """The 13-grams of a source's rows, in a file without a name, which ends with this object or its process.

    Rows without a word are left out.
    """

    def __init__(self, source: RowTexts) -> None:
        self.numbers = array("q")
        """Numbers of the rows."""
        self.text_hashes = array("Q")
        """Hashes of their texts."""
        self._ends = array("q", [0])
        total = len(source.rows.origins)
        with tempfile.TemporaryFile(dir=cache_root()) as file:
            for number, text in track(source.texts(), f"comparing {source.title}", total=total):
                grams = grams_of(text)
                if len(grams):
                    file.write(grams.tobytes())
                    self.numbers.append(number)
                    self.text_hashes.append(content_hash(text))
                    self._ends.append(self._ends[-1] + len(grams))
            file.flush()
            values = np.memmap(file, np.uint64, "r") if self._ends[-1] else np.empty(0, np.uint64)
        self.values: np.ndarray = values.view(np.ndarray)
        """Those of all rows, `[grams]` uint64."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self._ends[index] : self._ends[index + 1]]


Rows = list[tuple[int, np.ndarray]]
"""Number of each row, counted over all sources, and its grams."""


def _numbered(sources: Sequence[RowTexts], of_sources: Iterable[Grams]) -> Rows:
    """The rows of sources and their grams, without those that repeat an earlier one word for word."""
    rows: Rows = []
    start, known = 0, set[tuple[int, int]]()
    for source, grams in zip(sources, of_sources, strict=True):
        keys = source.rows.record_keys
        for index, (number, text) in enumerate(zip(grams.numbers, grams.text_hashes, strict=True)):
            # a key is that of the first record of a row, such as a response of a pair; the text is that of all of them
            key = int(keys[number]), text
            if key not in known:
                known.add(key)
                rows.append((start + number, grams[index]))
        start += len(keys)
    return rows


def near_duplicates(rows: Rows) -> list[tuple[int, int]]:
    """The rows that are near an earlier one, which is not near an earlier one itself; each with the first such row."""
    times, shift = _counts(rows)
    rows_with: defaultdict[int, defaultdict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    """Class of sizes -> gram -> places of the rows that have it among the first half of theirs."""
    last: dict[int, tuple[int, int]] = {}
    """The last of these, with how often it occurs: its place in the order of all grams."""
    near = []
    for place, (number, grams) in enumerate(track(rows, "comparing rows", total=len(rows))):
        size, least = len(grams), (len(grams) + 1) // 2
        counts = times[grams >> shift]
        shared_grams, counts = grams[counts > 1], counts[counts > 1]
        order = np.lexsort((shared_grams, counts))
        shared, counts = shared_grams[order].tolist(), counts[order].tolist()
        alone = size - len(shared)  # come first in the order of all grams
        if _prefix(size, least) <= alone:
            continue
        candidates = []
        for of_size in range(_class_of(least), _class_of(2 * size) + 1):
            prefix = _prefix(size, max(least, SIZES[of_size]))
            looked_up, others = shared[: max(0, prefix - alone)], rows_with[of_size]
            end = (counts[len(looked_up) - 1], looked_up[-1]) if looked_up else (0, 0)
            hits = Counter(chain.from_iterable(others[gram] for gram in looked_up if gram in others))
            for other, both in hits.items():
                theirs = len(rows[other][1])
                # what both may have beyond what was looked up
                rest = size - prefix if end <= last[other] else theirs - _prefix(theirs, (theirs + 1) // 2)
                if 3 * (both + rest) >= size + theirs:
                    candidates.append(other)
        nearest = next((other for other in sorted(candidates) if _is_near(grams, rows[other][1])), None)
        if nearest is not None:
            near.append((number, rows[nearest][0]))
            continue
        indexed = shared[: _prefix(size, least) - alone]
        last[place] = counts[len(indexed) - 1], indexed[-1]
        for gram in indexed:
            rows_with[_class_of(size)][gram].append(place)
    return near


SIZES = sorted({int(2 ** (i / 8)) for i in range(8 * 40)})
"""Numbers of grams at which classes of rows begin: rows that share too little for their sizes aren't looked up."""


def _class_of(size: int) -> int:
    return bisect_right(SIZES, size) - 1


def _prefix(size: int, least: int) -> int:
    """Length of the prefix (in the common order) that shares a gram with every near row of at least `least` grams.

    Near rows of at least `least` grams have `(size + least) / 3` grams in common.
    """
    return size - (size + least + 2) // 3 + 1


def _is_near(grams: np.ndarray, others: np.ndarray) -> bool:
    """Whether two rows have half of the grams that either has: `both / (a + b - both) >= 1 / 2`."""
    both = len(np.intersect1d(grams, others, assume_unique=True))
    return 3 * both >= len(grams) + len(others)


def _counts(rows: Rows) -> tuple[np.ndarray, np.uint64]:
    """A table whose entry at `gram >> shift` is the number of rows with a gram; collisions add to a few of them.

    More than 65,535 count as that many.
    """
    bits = min(LARGEST_TABLE, max(10, sum(len(grams) for _, grams in rows).bit_length() + 2))
    shift = np.uint64(64 - bits)
    table = np.zeros(1 << bits, np.uint16)
    for block in _blocks(rows):
        entries, counts = np.unique(np.concatenate([grams for _, grams in block]) >> shift, return_counts=True)
        table[entries] = np.minimum(counts + table[entries], 65_535)
    return table, shift


def _blocks(rows: Rows) -> Iterator[Rows]:
    iterator = iter(rows)
    while block := list(islice(iterator, BLOCK)):
        yield block


def text_in_training(of_sources: Sequence[Grams], training: Rows) -> list[dict[str, Any]]:
    """Counts the rows of each held-out source with text of training rows.

    Returns:
        For each source `rows`, how many of these have `half` of their grams in training, and the `first` of them, each
        with the training row that is the first to have most of its grams. Grams that more than 10 training rows have
        are left out, unless a row has no others.
    """
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *(grams.values for grams in of_sources)]))
    counts, owners = np.zeros(len(known), np.int64), np.zeros(len(known), np.int64)
    for number, grams in training:
        at = np.searchsorted(known, grams)
        at = at[at < len(known)]
        at = at[known[at] == grams[: len(at)]]  # both ascend, so that those beyond the end are the last
        owners[at[counts[at] == 0]] = number
        counts[at] += 1
    described = []
    for source in of_sources:
        rows, half = 0, 0
        first: list[tuple[int, int]] = []
        for index, number in enumerate(source.numbers):
            at = np.searchsorted(known, source[index])
            rare = at[counts[at] <= COMMON]
            at = rare if len(rare) else at
            in_training = at[counts[at] > 0]
            if len(in_training):
                rows += 1
                half += 2 * len(in_training) >= len(at)
                candidates, times = np.unique(owners[in_training], return_counts=True)
                first += [(number, int(candidates[times.argmax()]))] if len(first) < LISTED else []
        described.append({"rows": rows, "half": half, "first": first})
    return described
