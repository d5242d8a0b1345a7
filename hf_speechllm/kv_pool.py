"""Keys and values of tokens, stored once, however many hypotheses share them.

Shape legend: P tokens in the pool, N rows (hypotheses), W cached positions, M new tokens per row, G key/value heads, D
head width.

Hypotheses of a search are the leaves of a tree. A cache with a row per hypothesis holds what they share once for each,
and copies all of it whenever rows are dropped or repeated. Here a row is a list of places in a pool: to drop or repeat
it moves integers, and keys and values are gathered only for rows that the model runs on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KeysValues = Sequence[tuple[Tensor, Tensor]]  # per layer, [N, G, W, D] twice

_SMALLEST_CAPACITY = 256  # tokens


class KVPool:
    """Keys and values of tokens in all layers. Only ever added to, so that places stay valid.

    Attributes:
        size: P.
    """

    def __init__(self) -> None:
        self.size = 0
        self._layers: list[tuple[Tensor, Tensor]] = []  # [capacity, G, D] twice

    @property
    def capacity(self) -> int:
        """Tokens that fit in before memory has to grow."""
        return self._layers[0][0].shape[0] if self._layers else 0

    def append(self, keys_values: KeysValues, is_token: Tensor) -> Tensor:
        """Stores the columns where `is_token` [N, M, on the host], row by row; returns their places [count].

        Args:
            keys_values: per layer [N, G, M, D] twice.
            is_token: False for padding.
        """
        row, column = is_token.nonzero(as_tuple=True)
        new = [tuple(states[row, :, column] for states in layer) for layer in keys_values]  # count, G, D
        places = torch.arange(self.size, self.size + len(row))
        self._grow(self.size + len(row), new)
        for layer, new_layer in zip(self._layers, new, strict=True):
            for states, new_states in zip(layer, new_layer, strict=True):
                states[self.size : self.size + len(row)] = new_states
        self.size += len(row)
        return places

    def gather(self, places: Tensor) -> KeysValues:
        """[N, G, W, D] twice per layer of `places` [N, W, on the host]."""
        flat = places.flatten().to(self._layers[0][0].device)

        def rows(states: Tensor) -> Tensor:
            return states.index_select(0, flat).unflatten(0, places.shape).transpose(1, 2)

        return tuple((rows(keys), rows(values)) for keys, values in self._layers)

    def with_room(self, count: int, places: Tensor) -> tuple[KVPool, Tensor]:
        """A pool for `count` further tokens, and `places` [N, W, on the host] in it.

        It is this pool, unless that is full and the tokens at `places` are less than half of it: then a smaller copy.
        """
        if self.size + count <= self.capacity:
            return self, places
        used, new_places = places.unique(return_inverse=True)
        if 2 * len(used) > self.size:
            return self, places
        pool = KVPool()
        pool.append(self.gather(used[None]), torch.ones(1, len(used), dtype=torch.bool))
        return pool, new_places

    def _grow(self, size: int, like: KeysValues) -> None:
        """Makes room for `size` tokens, at least twice the room there was: copying costs no more than adding."""
        if size <= self.capacity:
            return
        capacity = max(size, 2 * self.capacity, _SMALLEST_CAPACITY)
        old = self._layers or [tuple(states[:0] for states in layer) for layer in like]
        # What is made in inference mode cannot be added to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            for index, layer in enumerate(old):  # layer by layer: old and new memory are held for one layer only
                grown = tuple(states.new_empty(capacity, *states.shape[1:]) for states in layer)
                for states, new_states in zip(layer, grown, strict=True):
                    new_states[: self.size] = states[: self.size]
                old[index] = grown
        self._layers = old
