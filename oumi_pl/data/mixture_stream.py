"""Several streams of documents as one, in proportions of tokens."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from oumi_pl.data.documents import Documents
from oumi_pl.data.mixture import mixture_counts
from oumi_pl.errors import UserError

Exhausted = Literal["stop", "restart"]


class TokenMixture:
    """Takes the next document from the source whose tokens fall shortest of its share: no draw, so no seed.

    After any document, the tokens of a source are within the longest document of its share, times one less than the
    number of sources. Without weights the sources come one after the other.

    Args:
        sources: Where the documents come from.
        weights: Share of each source in the tokens, in any unit; all None for one after the other.
        exhausted: What happens when a source is at its end: the stream `stop`s (without weights, when the last one is),
            or the source `restart`s (without weights, the first one does when the last is at its end).

    Raises:
        UserError: some sources have a weight and others none, or a weight isn't above 0; while reading: a source has no
            documents.
    """

    def __init__(self, sources: Sequence[Documents], weights: Sequence[float | None], exhausted: Exhausted) -> None:
        mixture_counts([1] * len(sources), weights)  # refuses what adds up to nothing
        self.sources = sources
        self.exhausted = exhausted
        given = np.array([weight for weight in weights if weight is not None], dtype=np.float64)
        self.shares = given / given.sum() if len(given) else None
        self._current = 0
        self.restore({"current": 0, **{name: [0] * len(sources) for name in ("documents", "passes", "tokens")}})

    def __iter__(self) -> "TokenMixture":
        return self

    def __next__(self) -> np.ndarray:
        """The ids of the next document, `[tokens]`."""
        while True:
            source = self._due()
            iterator = self._iterators[source]
            if iterator is None:
                iterator = self._iterators[source] = self.sources[source].read(self._documents[source])
            ids = next(iterator, None)
            if ids is not None:
                self._documents[source] += 1
                self._tokens[source] += len(ids)
                return ids
            if not self._documents[source]:
                raise UserError(f"{self.sources[source].name}: there are no documents in it")
            if not self._go_on_after(source):
                raise StopIteration

    def _due(self) -> int:
        """The source that falls shortest of its share; the first of equals."""
        if self.shares is None:
            return self._current
        return int(np.argmax(self.shares * sum(self._tokens) - self._tokens))

    def _go_on_after(self, source: int) -> bool:
        """Whether, and from where, the stream goes on when a source is at its end."""
        last = self.shares is not None or source == len(self.sources) - 1
        if last and self.exhausted == "stop":
            return False
        self._iterators[source] = None
        self._documents[source] = 0
        self._passes[source] += 1
        self._current = (source + 1) % len(self.sources)
        return True

    def state(self) -> dict[str, Any]:
        """Documents taken in the running pass, whole passes, and tokens so far, each per source; plain numbers."""
        return {
            "current": self._current,
            "documents": list(self._documents),
            "passes": list(self._passes),
            "tokens": list(self._tokens),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there.

        Raises:
            UserError: the state is of another number of sources.
        """
        if len(state["documents"]) != len(self.sources):
            raise UserError(
                f"the checkpoint was made with {len(state['documents'])} sources, this run has {len(self.sources)}; "
                "a run resumes with the sources that it began with"
            )
        self._current = state["current"]
        self._documents: list[int] = list(state["documents"])
        self._passes: list[int] = list(state["passes"])
        self._tokens: list[int] = list(state["tokens"])
        self._iterators: list[Iterator[np.ndarray] | None] = [None] * len(self.sources)
