"""Draws Pathfinder pictures: are the two discs on one dashed curve, or on two?

After Linsley et al. 2018 (arXiv 1805.08315), with the settings of Tay et al. 2021 (arXiv 2011.04006). A curve ("snake")
is a chain of strokes ("paddles"). Two target snakes grow side by side from seeds at a given distance; then distractors
fill the rest. A disc lies on the first tip of one target snake, another on the last tip of the same one (label 1) or of
the other (label 0).

Geometry. Both ends of a paddle are pixels. The next paddle turns around a pivot one margin further on, in one of K
directions spread over the circle; its start lies one margin from the pivot, and its end a paddle's length further.
Turning by an angle a has the weight max(0, cos(min(c |a|, pi/2)))^2, c the continuity, among the turns that are free.
So a paddle begins at most 2 margins, in rows and in columns, from the end of the one before it, and it keeps further
than that from all others: the target snakes cannot be taken for one. Distractors may come a pixel closer, or there
would be no room for them.

All pictures of a batch grow in step. One in which a snake finds no way on goes back a few paddles, and is given up
after a few such tries.

B: pictures, K: directions, C: turns, P: pixels that a paddle blocks for others, Q: pixels of a paddle.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cache

import numpy as np

LEVELS = (6, 9, 14)  # paddles of a target snake
STRETCH = 5  # paddles that are grown before going back is ruled out
TRIES = 12


@dataclass(frozen=True)
class Settings:
    """Sizes in pixels of the picture.

    Arguments:
        size: side of the picture.
        seed_distance: between the first tips of the two target snakes.
        marker_radius: of the discs.
        thickness, length: of a paddle.
        margins: around a paddle; one is drawn for each picture.
        continuity: c; the larger, the straighter.
        distractor_paddles: in all distractors together.
        contrast: grey of a paddle that covers its pixel.
        padding: pixels along the border that stay free.
        antialias: pixels are drawn so many times finer, and averaged.
    """

    size: int
    seed_distance: int
    marker_radius: float
    thickness: float
    length: int
    margins: tuple[int, ...]
    continuity: float
    distractor_paddles: int
    contrast: float
    padding: int = 1
    antialias: int = 2


SETTINGS = {
    32: Settings(32, 7, 1.5, 0.5, 2, (1,), 1.0, 20, 2 * 0.75),
    64: Settings(64, 12, 2.5, 1.0, 5, (1,), 1.8, 22, 1.0),
    128: Settings(128, 20, 3.0, 1.5, 5, (2, 3), 1.8, 35, 0.9),
    256: Settings(256, 27, 5.0, 2.0, 5, (3,), 1.8, 30, 1.0),
}


@dataclass(frozen=True)
class Pictures:
    """Arguments:
    images: uint8 [B, size, size].
    labels: uint8 [B].
    targets: bool [B, size, size], the pixels of the two target snakes.
    markers: int64 [B, 2, 2], row and column of the two discs.
    margins: int64 [B].
    """

    images: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    markers: np.ndarray
    margins: np.ndarray


def draw(generator: np.random.Generator, settings: Settings, *, paddles: int, count: int) -> Pictures:
    """Draw pictures.

    Arguments:
        paddles: of a target snake.
        count: B.
    """
    margins = settings.margins
    shares = generator.multinomial(count, [1 / len(margins)] * len(margins))
    parts = [
        _draw(generator, _Stamps.of(settings, margin), paddles, int(share))
        for margin, share in zip(margins, shares, strict=True)
        if share
    ]
    order = generator.permutation(count)
    return Pictures(*(np.concatenate([getattr(part, name) for part in parts])[order] for name in _FIELDS))


_FIELDS = ("images", "labels", "targets", "markers", "margins")


def _draw(generator: np.random.Generator, stamps: _Stamps, paddles: int, count: int) -> Pictures:
    found: list[Pictures] = []
    missing = count
    while missing > 0:
        batch = _Batch(generator, stamps, min(stamps.batch, 16 + 8 * missing))
        batch.grow_targets(paddles)
        length = max(1, paddles // 3)
        for _ in range(stamps.settings.distractor_paddles // length):
            batch.add_distractor(length)
        if batch.count:
            found.append(batch.render())
            missing -= batch.count
    return Pictures(*(np.concatenate([getattr(part, name) for part in found])[:count] for name in _FIELDS))


class _Stamps:
    """What a paddle covers and blocks, relative to the pixel it starts from, for each direction and turn.

    The grid of a picture has a blocked frame of `frame` pixels around it, so that no stamp ever leaves it. A stamp is a
    row of offsets into the flattened grid; rows are filled up by repeating an offset.

    Stamp k < K: the first paddle of a snake, from its tip in direction k. Stamp K + k C + j: a paddle that follows one
    of direction k with turn j.
    """

    def __init__(self, settings: Settings, margin: int) -> None:
        self.settings = settings
        self.margin = margin
        radius = settings.length + margin
        self.frame = radius + 3 * margin + int(settings.thickness) + 2
        self.side = settings.size + 2 * self.frame
        self.batch = max(16, 4_000 * 32 * 32 // settings.size**2)
        self.directions = 4 * round(2 * np.pi * radius / 4)  # one for each pixel along the circle
        angles = 2 * np.pi * np.arange(self.directions) / self.directions
        self.units = np.stack([np.sin(angles), np.cos(angles)], axis=1)  # [K, (row, column)]
        self._make_turns()
        self._make_paddles(radius)

    @staticmethod
    @cache
    def of(settings: Settings, margin: int) -> _Stamps:
        return _Stamps(settings, margin)

    def _make_turns(self) -> None:
        turns = np.arange(-self.directions // 2, self.directions // 2)
        angles = np.abs(2 * np.pi * turns / self.directions)
        weights = np.maximum(0, np.cos(np.minimum(self.settings.continuity * angles, np.pi / 2))) ** 2
        self.turns = turns[weights > 1e-9]  # [C]
        self.turn_weights = weights[weights > 1e-9]

    def _make_paddles(self, radius: int) -> None:
        starts, ends = [np.zeros(2)] * self.directions, list(np.rint(self.units * self.settings.length))
        for before in range(self.directions):
            for turn in self.turns:
                unit = self.units[(before + turn) % self.directions]
                pivot = self.margin * self.units[before]
                starts.append(np.rint(pivot + self.margin * unit))
                ends.append(np.rint(pivot + radius * unit))
        covered = [_coverage(start, end, self.settings) for start, end in zip(starts, ends, strict=True)]
        self.pixels = self._flat([list(one) for one in covered])  # [stamps, Q]
        values = [np.array(list(one.values())) for one in covered]
        width = self.pixels.shape[1]
        shades = np.stack([np.pad(value, (0, width - len(value)), mode="edge") for value in values])
        self.values = np.minimum(1.0, shades * self.settings.contrast)
        # [stamps, P]: what a paddle blocks for target snakes, and what it blocks for distractors.
        self.blocked = self._flat([_dilate(one, 2 * self.margin) for one in covered])
        self.blocked_closer = self._flat([_dilate(one, 2 * self.margin - 1) for one in covered])
        self.ends = self._flat([[(int(row), int(column))] for row, column in ends])[:, 0]

    def _flat(self, rows: list[list[tuple[int, int]]]) -> np.ndarray:
        width = max(map(len, rows))
        offsets = [[row * self.side + column for row, column in pixels] for pixels in rows]
        return np.array([one + one[-1:] * (width - len(one)) for one in offsets])


def _coverage(start: np.ndarray, end: np.ndarray, settings: Settings) -> dict[tuple[int, int], float]:
    """The share of each pixel that a stroke covers, pixels of (row, column) relative to the origin.

    The finer grid has its own pixels at multiples of 1 / antialias; one is inked where its middle is within half the
    thickness of the stroke's axis, or within half a fine pixel, so that no stroke is broken.
    """
    scale = settings.antialias
    reach = int(np.abs(np.stack([start, end])).max() + settings.thickness) + 2
    fine = np.arange(-reach * scale, (reach + 1) * scale) / scale
    grid = np.stack(np.meshgrid(fine, fine, indexing="ij"), axis=-1)
    axis = end - start
    along = np.clip(((grid - start) @ axis) / max(axis @ axis, 1e-9), 0, 1)
    distance = np.linalg.norm(grid - start - along[..., None] * axis, axis=-1)
    inked = distance <= max(settings.thickness / 2, 0.5 / scale) + 1e-9
    side = 2 * reach + 1
    share = inked.reshape(side, scale, side, scale).mean(axis=(1, 3))
    rows, columns = np.nonzero(share)
    return {(int(r) - reach, int(c) - reach): float(share[r, c]) for r, c in zip(rows, columns, strict=True)}


def _dilate(pixels: dict[tuple[int, int], float], distance: int) -> list[tuple[int, int]]:
    """The pixels within so many rows and columns of any of `pixels`."""
    reach = range(-distance, distance + 1)
    return sorted({(row + r, column + c) for row, column in pixels for r in reach for c in reach})


_FREE, _FRAME = 0, -1


class _Batch:
    """Pictures that grow in step; the paddles of a picture are numbered from 1 in the order of growth.

    `grid` [B, side * side] holds for each pixel 0, or the number of the paddle that blocks it alone, or -1. What it
    holds of a paddle is free for the paddle that follows it. (A distractor grows by itself: there the first that
    blocked a pixel keeps it, so that its own pixels can be given back.)
    """

    ARRAYS = ("grid", "strokes", "first_tips", "heads", "directions")

    def __init__(self, generator: np.random.Generator, stamps: _Stamps, count: int) -> None:
        self.generator = generator
        self.stamps = stamps
        self.targets = 0  # paddles of the target snakes, which come first in `strokes`
        size, frame = stamps.settings.size, stamps.frame
        inner = slice(frame + stamps.settings.padding, frame + size - stamps.settings.padding)
        picture = np.full((stamps.side, stamps.side), _FRAME, dtype=np.int8)
        picture[inner, inner] = _FREE
        self.empty = picture.reshape(-1)
        self.grid = np.tile(self.empty, (count, 1))
        self.strokes = np.zeros((count, 0, 2), dtype=np.int64)  # [B, paddles, (start, stamp)]
        self.first_tips = np.zeros((count, 2), dtype=np.int64)  # [B, snake], as all that follow
        self.heads = np.zeros((count, 2), dtype=np.int64)  # the last tips
        self.directions = np.zeros((count, 2), dtype=np.int64)

    @property
    def count(self) -> int:
        return len(self.grid)

    @property
    def rows(self) -> np.ndarray:
        return np.arange(self.count)

    def keep(self, alive: np.ndarray) -> None:
        """Give up the other pictures."""
        for name in self.ARRAYS:
            setattr(self, name, getattr(self, name)[alive])

    def take(self, chosen: np.ndarray) -> _Batch:
        """A batch of copies of the chosen pictures."""
        other = copy(self)
        other.keep(chosen)
        return other

    def join(self, others: list[_Batch]) -> None:
        """Become the pictures of the others."""
        for name in self.ARRAYS:
            setattr(self, name, np.concatenate([getattr(other, name) for other in others]))

    def grow_targets(self, paddles: int) -> None:
        """Two snakes, a paddle of each in turn."""
        self._seed_targets()
        for begin in range(1, paddles, STRETCH):
            self._grow_stretch(min(STRETCH, paddles - begin))
        self.targets = self.strokes.shape[1]
        self._let_distractors_closer()

    def _seed_targets(self) -> None:
        """First paddles: the first near the middle, the second at the seed distance from it."""
        stamps, settings = self.stamps, self.stamps.settings
        border = min(2 * settings.seed_distance, settings.size // 2 - 1)
        first = self.generator.integers(border, settings.size - border, (self.count, 2))
        angle = self.generator.uniform(0, 2 * np.pi, self.count)
        apart = np.stack([np.sin(angle), np.cos(angle)], axis=1) * settings.seed_distance
        places = np.stack([first, first + np.rint(apart).astype(np.int64)], axis=1)
        self.first_tips = (places + stamps.frame) @ np.array([stamps.side, 1])  # [B, 2]
        self.directions = self.generator.integers(0, stamps.directions, (self.count, 2))
        self.keep(np.all((places >= 0) & (places < settings.size), axis=(1, 2)))
        for snake in range(2):
            tips, directions = self.first_tips[:, snake], self.directions[:, snake]
            self.keep(self._is_free(tips[:, None], directions[:, None], _FREE, self.rows)[:, 0])
            self._place(self.first_tips[:, snake], self.directions[:, snake])
        self.heads = self.first_tips + stamps.ends[self.directions]

    def _grow_stretch(self, paddles: int) -> None:
        """Some paddles more of both snakes; where they find no way, the stretch is tried again."""
        grown: list[_Batch] = []
        waiting = self.rows
        for _ in range(TRIES):
            attempt, numbers = self.take(waiting), waiting
            for _ in range(paddles):
                for snake in range(2):
                    numbers = numbers[attempt._extend(snake)]
            grown.append(attempt)
            waiting = np.setdiff1d(waiting, numbers)
        self.join(grown)

    def _extend(self, snake: int) -> np.ndarray:
        """One paddle more of a snake; gives up pictures without a way and returns which are left, bool [B before]."""
        own = self.strokes.shape[1] - 1  # the paddle before the other snake's last one
        chosen, found = self._choose_turn(self.heads[:, snake], self.directions[:, snake], own, self.rows)
        self.keep(found)
        chosen, starts = chosen[found], self.heads[:, snake].copy()
        self._place(starts, chosen)
        self.heads[:, snake] = starts + self.stamps.ends[chosen]
        self.directions[:, snake] = self._direction(chosen)
        return found

    def _let_distractors_closer(self) -> None:
        self.grid = np.tile(self.empty, (self.count, 1))
        for paddle in range(self.targets):
            starts, chosen = self.strokes[:, paddle].T
            self._block(self.rows, starts[:, None] + self.stamps.blocked_closer[chosen], paddle + 1)

    def add_distractor(self, paddles: int, *, tries: int = 12, seeds: int = 24) -> None:
        """One more snake in every picture; a picture in which it finds no room after all tries is given up."""
        stamps, settings = self.stamps, self.stamps.settings
        waiting = self.rows
        strokes = np.zeros((self.count, paddles, 2), dtype=np.int64)
        number = self.strokes.shape[1] + 1
        for _ in range(tries):
            places = self.generator.integers(0, settings.size, (len(waiting), seeds, 2)) + stamps.frame
            starts = places @ np.array([stamps.side, 1])
            chosen = self.generator.integers(0, stamps.directions, starts.shape)
            free = self._is_free(starts, chosen, _FREE, waiting)
            found, place = free.any(axis=1), (np.arange(len(waiting)), free.argmax(axis=1))
            starts, chosen, rows = starts[place][found], chosen[place][found], waiting[found]
            for paddle in range(paddles):
                if paddle:
                    starts = starts + stamps.ends[chosen]
                    chosen, found = self._choose_turn(starts, self._direction(chosen), number + paddle - 1, rows)
                    self._erase(rows[~found], number, number + paddle)
                    starts, chosen, rows = starts[found], chosen[found], rows[found]
                self._block(rows, starts[:, None] + stamps.blocked_closer[chosen], number + paddle)
                strokes[rows, paddle, 0], strokes[rows, paddle, 1] = starts, chosen
            waiting = np.setdiff1d(waiting, rows)
            if not len(waiting):
                break
        self.strokes = np.concatenate([self.strokes, strokes], axis=1)
        self.keep(~np.isin(self.rows, waiting))

    def _block(self, rows: np.ndarray, pixels: np.ndarray, number: int) -> None:
        """Give the free ones of the pixels [B, P] of some pictures to a paddle."""
        before = self.grid[rows[:, None], pixels]
        self.grid[rows[:, None], pixels] = np.where(before == _FREE, number, before)

    def _erase(self, rows: np.ndarray, first: int, last: int) -> None:
        part = self.grid[rows]
        part[(part >= first) & (part <= last)] = _FREE
        self.grid[rows] = part

    def _is_free(self, starts: np.ndarray, chosen: np.ndarray, own: int, rows: np.ndarray) -> np.ndarray:
        """bool [B, n]: whether the stamps `chosen` [B, n] at `starts` [B, n] meet nothing but the paddle `own`."""
        pixels = self.grid[rows[:, None, None], starts[..., None] + self.stamps.pixels[chosen]]  # [B, n, Q]
        return ((pixels == _FREE) | (pixels == own)).all(axis=-1)

    def _choose_turn(
        self, starts: np.ndarray, before: np.ndarray, own: int, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The stamp of the next paddle [B], and whether there was one [B]."""
        stamps = self.stamps
        turns = len(stamps.turns)
        candidates = stamps.directions + before[:, None] * turns + np.arange(turns)
        free = self._is_free(np.broadcast_to(starts[:, None], candidates.shape), candidates, own, rows)
        summed = np.cumsum(free * stamps.turn_weights, axis=1)
        drawn = self.generator.random(len(starts)) * summed[:, -1]
        chosen = (summed <= drawn[:, None]).sum(axis=1).clip(max=turns - 1)
        return candidates[np.arange(len(starts)), chosen], summed[:, -1] > 0

    def _direction(self, chosen: np.ndarray) -> np.ndarray:
        """The direction of the paddles that are these stamps."""
        stamps = self.stamps
        before, turn = np.divmod(chosen - stamps.directions, len(stamps.turns))
        return np.where(chosen < stamps.directions, chosen, (before + stamps.turns[turn]) % stamps.directions)

    def _place(self, starts: np.ndarray, chosen: np.ndarray) -> None:
        """The next paddle of every picture.

        As two snakes grow at once, what two paddles block is no longer free for the one that follows either.
        """
        number = self.strokes.shape[1] + 1
        pixels = starts[:, None] + self.stamps.blocked[chosen]
        before = self.grid[self.rows[:, None], pixels]
        self.grid[self.rows[:, None], pixels] = np.where(before == _FREE, number, _FRAME)
        self.strokes = np.concatenate([self.strokes, np.stack([starts, chosen], axis=1)[:, None]], axis=1)

    def render(self) -> Pictures:
        """Draw the strokes and the discs."""
        stamps, settings = self.stamps, self.stamps.settings
        rows = self.rows[:, None]
        canvas = np.zeros(self.grid.shape, dtype=np.float32)
        for paddle in range(self.strokes.shape[1]):
            if paddle == self.targets:
                targets = canvas > 0
            starts, chosen = self.strokes[:, paddle, 0], self.strokes[:, paddle, 1]
            pixels = starts[:, None] + stamps.pixels[chosen]
            canvas[rows, pixels] = np.maximum(canvas[rows, pixels], stamps.values[chosen])
        if self.targets == self.strokes.shape[1]:
            targets = canvas > 0
        labels = self.generator.integers(0, 2, self.count).astype(np.uint8)
        snake = self.generator.integers(0, 2, self.count)
        one = self.first_tips[self.rows, snake]
        other = self.heads[self.rows, np.where(labels == 1, snake, 1 - snake)]
        markers = np.stack([one, other], axis=1)  # [B, 2]
        pixels, values = self._disc()
        for marker in (one, other):
            where = marker[:, None] + pixels
            canvas[rows, where] = np.maximum(canvas[rows, where], values)
        cut = slice(stamps.frame, stamps.frame + settings.size)
        shape = (self.count, stamps.side, stamps.side)
        images = np.rint(canvas.reshape(shape)[:, cut, cut] * 255).astype(np.uint8)
        places = np.stack(np.divmod(markers, stamps.side), axis=-1) - stamps.frame
        margins = np.full(self.count, stamps.margin)
        return Pictures(images, labels, targets.reshape(shape)[:, cut, cut], places, margins)

    def _disc(self) -> tuple[np.ndarray, np.ndarray]:
        settings, side = self.stamps.settings, self.stamps.side
        scale, reach = settings.antialias, int(settings.marker_radius) + 2
        fine = np.arange(-reach * scale, (reach + 1) * scale) / scale
        inked = fine[:, None] ** 2 + fine**2 <= settings.marker_radius**2
        share = inked.reshape(2 * reach + 1, scale, 2 * reach + 1, scale).mean(axis=(1, 3))
        rows, columns = np.nonzero(share)
        return (rows - reach) * side + columns - reach, share[rows, columns].astype(np.float32)
