"""Numbers of classes: the splits of a store have one numbering, and names decide it.

A source numbers its own classes from 0, so that `b` is 1 among a, b, c and 0 among b, c. A split that is added to a store takes the store's
number of every name that is there. A new name keeps its own number where that is free, else it takes the lowest free one; no number that is in
the store changes its meaning. Labels that are numbers without names are left as they are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import MismatchError, StoreError
from .image_sources.items import NO_LABEL, ImageItem, ItemColumns
from .manifest import parse_manifest
from .store import is_store, manifest_key, split_attributes
from .store_folder import StoreFolder

Pair = tuple[str, int]
"""(name, number) of a class. A name may have several numbers in one source: ImageNet has two classes called crane."""
_SHOWN = 3


@dataclass(frozen=True)
class Classes:
    """Those of the images of a source or of a split."""

    pairs: frozenset[Pair] = frozenset()
    unnamed: bool = False
    """Some images have a number without a name."""

    @classmethod
    def of(cls, pairs: Iterable[Pair]) -> Classes:
        """From (name, number) of images; -1 means no class, an empty name none."""
        labelled = {(name, number) for name, number in pairs if number != NO_LABEL}
        named = frozenset(pair for pair in labelled if pair[0])
        return cls(named, unnamed=len(named) < len(labelled))

    def numbers(self) -> dict[str, set[int]]:
        """Numbers of each name."""
        found: dict[str, set[int]] = defaultdict(set)
        for name, number in self.pairs:
            found[name].add(number)
        return dict(found)


@dataclass(frozen=True)
class Numbering:
    """How the classes of a source are numbered in a store."""

    changed: Mapping[Pair, int] = field(default_factory=dict)
    """Number in the store by name and number in the source; classes that keep theirs are not in it."""
    classes: tuple[Pair, ...] = ()
    """Of the split, sorted by their number in the store."""
    unnamed: bool = False
    notes: tuple[str, ...] = ()
    """What the user should know: names that were renumbered or are new."""
    warnings: tuple[str, ...] = ()
    """What cannot be brought to one numbering."""

    def label(self, item: ImageItem) -> int:
        """The item's label in the store."""
        return self.changed.get((item.class_name, item.label), item.label)


def classes_in(items: Sequence[ImageItem]) -> Classes:
    """The classes of a source's images."""
    return Classes.of(items.classes() if isinstance(items, ItemColumns) else ((item.class_name, item.label) for item in items))


def number_in_store(folder: StoreFolder, split: str, own: Classes, *, overwrite: bool = False, refuse: bool = False) -> Numbering:
    """How a split that holds `own` is numbered in a store that may not be there yet. Whoever writes by it should hold the folder's lock.

    Args:
        overwrite: the split is made anew. Its old numbers hold on for what the other splits do not number; where it is alone, none does.
        refuse: a class that no other split has is an error.

    Raises:
        MismatchError: there is such a class; or a name has several numbers, and not this one.
        StoreError: a split is damaged.
    """
    if not is_store(folder):
        return number_classes(split, own, {}, refuse=refuse)
    found = split_attributes(folder, but=split if overwrite else None)
    if split in found and "classes" not in found[split]:  # begun by an earlier version
        return number_classes(split, own, {})
    splits = {name: _recorded(folder, name, attributes) for name, attributes in found.items()}
    if overwrite and splits:
        with contextlib.suppress(StoreError, KeyError):  # a damaged split may be replaced
            old = _recorded(folder, split, split_attributes(folder)[split])
            return number_classes(split, own, splits, old=old, refuse=refuse)
    return number_classes(split, own, splits, refuse=refuse)


def number_classes(split: str, own: Classes, splits: Mapping[str, Classes], *, old: Classes | None = None, refuse: bool = False) -> Numbering:
    """As `number_in_store`, with the classes of all splits given; `old` are those of the split that is replaced."""
    there: dict[str, set[int]] = defaultdict(set)
    for recorded in splits.values():
        for name, number in recorded.pairs:
            there[name].add(number)
    used = set(itertools.chain.from_iterable(there.values()))
    for name, number in old.pairs if old else ():
        if name not in there and number not in used:
            there[name] = {number}
    used.update(*there.values())
    known, new = _look_up(split, own, there)
    if refuse and there and new:
        shown = _shown(name for name, _ in new)
        raise MismatchError(
            f'{len(new)} of the {len(own.pairs)} classes of split "{split}" are in no other split of the store ({shown}); '
            "check that these are the right images, or give --new-classes append"
        )
    numbers = known | _give_numbers(new, used)
    changed = {pair: number for pair, number in numbers.items() if number != pair[1]}
    notes = []
    if changed:
        shown = _shown(f"{name} {own_number} -> {number}" for (name, own_number), number in changed.items())
        notes.append(f'{len(changed)} classes of split "{split}" get other numbers than in their source, the store\'s by name: {shown}')
    if new and there:
        shown = _shown(f"{pair[0]} = {numbers[pair]}" for pair in new)
        notes.append(f'{len(new)} of the {len(own.pairs)} classes of split "{split}" are new to the store and are appended: {shown}')
    classes = sorted(((name, number) for (name, _), number in numbers.items()), key=lambda pair: (pair[1], pair[0]))
    others = {name: classes for name, classes in splits.items() if name != split}
    return Numbering(changed, tuple(classes), own.unnamed, tuple(notes), tuple(_warnings(split, own, others)))


def _look_up(split: str, own: Classes, there: Mapping[str, set[int]]) -> tuple[dict[Pair, int], list[Pair]]:
    """Numbers of the names that are in the store, and the other names in the order of their own numbers."""
    known: dict[Pair, int] = {}
    new: list[Pair] = []
    own_numbers = own.numbers()
    for name, number in sorted(own.pairs, key=lambda pair: (pair[1], pair[0])):
        numbers = there.get(name)
        if numbers is None:
            new.append((name, number))
        elif len(numbers) == len(own_numbers[name]) == 1:
            (known[name, number],) = numbers
        elif number in numbers:
            known[name, number] = number
        else:
            has, told = sorted(own_numbers[name]), ", ".join(map(str, sorted(numbers)))
            raise MismatchError(
                f'class {name} of split "{split}" has the number {", ".join(map(str, has))}, and {told} in the store: where a name has '
                "several numbers they must be the same; give the classes names of their own, or choose another store"
            )
    return known, new


def _give_numbers(new: Iterable[Pair], used: set[int]) -> dict[Pair, int]:
    """A new name's own number where it is free, else the lowest free one."""
    given: dict[Pair, int] = {}
    late = []
    for pair in new:
        if pair[1] in used:
            late.append(pair)
        else:
            given[pair] = pair[1]
            used.add(pair[1])
    free = (number for number in itertools.count() if number not in used)
    return given | dict(zip(late, free, strict=False))


def _warnings(split: str, own: Classes, others: Mapping[str, Classes]) -> Iterator[str]:
    """What names cannot decide: splits of earlier versions that contradict each other, and numbers without names."""
    for (first, one), (second, two) in itertools.combinations(others.items(), 2):
        ours, theirs = one.numbers(), two.numbers()
        apart = sorted(name for name in ours.keys() & theirs.keys() if not ours[name] & theirs[name])
        if apart:
            mend = "encode one of them again with --overwrite"
            yield f'splits "{first}" and "{second}" number {len(apart)} classes differently ({_shown(apart)}); {mend}'
    everyone = {split: own, **others}
    named, unnamed = ([name for name, classes in everyone.items() if has(classes)] for has in (lambda c: c.pairs, lambda c: c.unnamed))
    if named and unnamed and (own.pairs or own.unnamed) and others:
        yield (
            f"labels of split {_shown(unnamed)} are numbers without names, and those of split {_shown(named)} have names, so that they cannot be "
            "compared; see to it that they mean the same classes"
        )


def _recorded(folder: StoreFolder, name: str, attributes: Mapping[str, Any]) -> Classes:
    """Of a split of the store; those of earlier versions have them in the manifest alone."""
    if "classes" in attributes:
        return Classes(frozenset((name, number) for name, number in attributes["classes"]), attributes["unnamed_labels"])
    data = folder.read(manifest_key(name)) if attributes["complete"] else None
    if data is None:
        return Classes()
    pairs = parse_manifest(data, columns=["class_name", "label"]).group_by(["class_name", "label"]).aggregate([])
    return Classes.of(zip(pairs["class_name"].to_pylist(), pairs["label"].to_pylist(), strict=True))


def _shown(texts: Iterable[str]) -> str:
    texts = list(texts)
    return ", ".join(texts[:_SHOWN]) + (f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else "")
