"""Store of past responses, in memory, each visible to the client that it was made for.

Rule 1: it has at most `capacity` responses and `max_bytes` of JSON; the least recently used ones leave first.
Rule 2: a response of another client does not exist.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from mlxserver.config.errors import abbreviate


class ResponseNotFound(Exception):
    """There is no such response, or none of this client."""

    def __init__(self, id: str) -> None:
        super().__init__(f"Response with id {abbreviate(id)} not found.")


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response, as JSON. input: the items that it was made from. output: those that were generated, by their ids.

    A reference to an item reads that item alone, however large the response is.
    """

    response: bytes
    input: bytes
    output: Mapping[str, bytes]

    @property
    def bytes(self) -> int:
        """Size of all."""
        return len(self.response) + len(self.input) + sum(map(len, self.output.values()))

    @property
    def input_items(self) -> list[dict[str, Any]]:
        """The items that it was made from."""
        return orjson.loads(self.input)  # type: ignore[no-any-return]

    @property
    def output_items(self) -> list[dict[str, Any]]:
        """The items that were generated."""
        return [orjson.loads(item) for item in self.output.values()]


Key = tuple[str, str]  # of a client, and of a response or an item


class ResponseStore:
    """Responses by client and id, in the order of their last use. capacity 0 keeps none."""

    def __init__(self, capacity: int, max_bytes: int) -> None:
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._bytes = 0
        self._responses: OrderedDict[Key, StoredResponse] = OrderedDict()
        self._owners: dict[Key, str] = {}  # response of each generated item

    def __len__(self) -> int:
        return len(self._responses)

    @property
    def is_on(self) -> bool:
        """Whether responses are kept."""
        return self._capacity > 0

    def put(self, client: str, response: Mapping[str, Any], input: Sequence[Mapping[str, Any]]) -> None:
        """Keep a response, unless it is larger than all may be."""
        output = {item["id"]: orjson.dumps(item) for item in response["output"]}
        stored = StoredResponse(orjson.dumps(response), orjson.dumps(input), output)
        if not self.is_on or stored.bytes > self._max_bytes:
            return
        self._responses[client, response["id"]] = stored
        self._owners |= {(client, id): response["id"] for id in output}
        self._bytes += stored.bytes
        while len(self._responses) > self._capacity or self._bytes > self._max_bytes:
            self._forget(*next(iter(self._responses)))

    def get(self, client: str, id: str) -> StoredResponse:
        """A response. Raises ResponseNotFound."""
        if (client, id) not in self._responses:
            raise ResponseNotFound(id)
        self._responses.move_to_end((client, id))
        return self._responses[client, id]

    def delete(self, client: str, id: str) -> None:
        """Forget a response. Raises ResponseNotFound."""
        self.get(client, id)
        self._forget(client, id)

    def item(self, client: str, id: str) -> dict[str, Any] | None:
        """A generated item of a response that is kept."""
        owner = self._owners.get((client, id))
        return orjson.loads(self.get(client, owner).output[id]) if owner else None  # type: ignore[no-any-return]

    def _forget(self, client: str, id: str) -> None:
        stored = self._responses.pop((client, id))
        self._bytes -= stored.bytes
        for item in stored.output:
            del self._owners[client, item]
