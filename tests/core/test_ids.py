"""Ids: of the right form, all different, and as random as what they are made of."""

from __future__ import annotations

import uuid

from asyncproxy.core.ids import RandomIds


def test_they_are_uuids_of_version_4_and_all_different() -> None:
    new_id = RandomIds()
    ids = [new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    for id_ in ids:
        parsed = uuid.UUID(id_)
        assert (str(parsed), parsed.version, parsed.variant) == (id_, 4, uuid.RFC_4122)


def test_each_takes_bytes_of_its_own() -> None:
    asked: list[int] = []

    def counting(size: int) -> bytes:
        asked.append(size)
        return b"".join(i.to_bytes(16, "big") for i in range(size // 16))

    new_id = RandomIds(counting)
    first = [new_id() for _ in range(asked[0] // 16 if asked else 256)]
    assert len(set(first)) == len(first)
    assert sum(asked) == 16 * len(first)


def test_every_random_bit_is_used() -> None:
    """All bits set or none: only version and variant stay."""
    ones, zeros = RandomIds(lambda n: b"\xff" * n)(), RandomIds(lambda n: b"\x00" * n)()
    assert ones == "ffffffff-ffff-4fff-bfff-ffffffffffff"
    assert zeros == "00000000-0000-4000-8000-000000000000"
