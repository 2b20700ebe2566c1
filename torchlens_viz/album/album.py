"""`Album`: the sprites of a page, where they are kept, and the blocks of tiles in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Final, final

from torchlens_viz.album.shelf import Shelf
from torchlens_viz.album.sprite import Block, Pixels, Range, Sprite

_TILE: Final = 64  # CSS pixels, at least, to which a tile is enlarged by a whole factor
_LARGE: Final = 168  # its longer side where it stands by itself
_COARSE: Final = 42  # pixels a side, up to which a tile is enlarged by a whole factor there too
_PITCH: Final = 42  # CSS pixels, at most, from part to part of a strip: a telephone holds eight


@final
@dataclass(frozen=True, kw_only=True)
class View:
    """A block of tiles, one per channel that is shown.

    Attributes:
        block: Where the tiles stand.
        factor: By how much the page enlarges them.
        limits: What the colours stand for; None where the tiles are in colour.
        note: What a tile is.
        pitch: CSS pixels from part to part of a tile that holds several; 0 where it holds one.
    """

    block: Block
    factor: int
    limits: Range | None
    note: str
    pitch: int = 0

    @property
    def large(self) -> float:
        """The factor for a tile whose channel is shown by itself; that of few pixels is whole."""
        longest = max(self.block.height, self.block.width)
        return _LARGE // longest if longest <= _COARSE else _LARGE / longest


@final
@dataclass(kw_only=True)
class Album:
    """All sprites of a page: their addresses, and the blocks in them.

    Attributes:
        shelf: Where the pictures are kept.
        addresses: By the number of the sprite.
        sprites: By their numbers.
        views: By the numbers of their blocks.
    """

    shelf: Shelf
    addresses: dict[int, str] = field(default_factory=dict)
    sprites: dict[int, Sprite] = field(default_factory=dict)
    views: list[View] = field(default_factory=list)

    def sprite(self, *, gap: int = 1) -> Sprite:
        """Begin a sprite."""
        sprite = Sprite(len(self.sprites), gap=gap)
        self.sprites[sprite.number] = sprite
        return sprite

    def add(
        self,
        sprite: Sprite,
        tiles: Pixels,
        limits: Range | None,
        note: str,
        *,
        least: int = _TILE,
    ) -> View:
        """Add tiles to a sprite, to be enlarged to at least so many CSS pixels."""
        block = sprite.add(len(self.views), tiles)
        view = View(
            block=block, factor=ceil(least / max(block.height, block.width)), limits=limits, note=note
        )
        self.views.append(view)
        return view

    def add_strips(self, sprite: Sprite, tiles: Pixels, limits: Range, note: str, *, parts: int) -> View:
        """Add tiles that hold so many parts side by side, to be enlarged as far as a telephone has room."""
        block = sprite.add(len(self.views), tiles)
        part = block.width // parts
        factor = max(1, _PITCH // part)
        view = View(block=block, factor=factor, limits=limits, note=note, pitch=factor * part)
        self.views.append(view)
        return view

    def close(self, sprite: Sprite, picture: bytes, name: str) -> None:
        """Keep a sprite's picture under a name; its pixels are needed no more."""
        self.addresses[sprite.number] = self.shelf.address(picture, name)
        sprite.forget()
