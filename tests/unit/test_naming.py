from __future__ import annotations

from hashlib import blake2b, blake2s

from kvstore.naming import RememberedNames, namer

SECRET, LAYOUT = b"secret", b"layout"


def keys(count: int, start: int = 0) -> list[bytes]:
    return [number.to_bytes(32, "little") for number in range(start, start + count)]


def test_names_are_those_that_are_written_down() -> None:
    """A change of names makes a stranger of every block that lies on NVMe, and of every
    client of another version."""
    of_layout = blake2b(LAYOUT, key=SECRET, digest_size=32).digest()
    for key in keys(3):
        expected = blake2s(of_layout + key, digest_size=16).digest()
        assert namer(SECRET, LAYOUT)(key) == expected
    assert namer(SECRET, LAYOUT)(bytes(32)).hex() == "7fbb5f867e66da3414736e52b98f19b1"


def test_secrets_layouts_and_keys_tell_names_apart() -> None:
    namers = [namer(s, i) for s in (b"s", b"s\0", bytes(64)) for i in (b"a" * 16, b"b" * 16)]
    names = {name(key) for name in namers for key in keys(10)}
    assert len(names) == len(namers) * 10


def test_remembered_names_are_the_same_and_bounded() -> None:
    """Over all layouts together: how many those are is up to the tenants."""
    names = RememberedNames(100)
    plain = [namer(SECRET, bytes([layout])) for layout in range(7)]
    remembering = [names.namer(SECRET, bytes([layout])) for layout in range(7)]
    for start in (0, 0, 50, 0, 80):
        for one, other in zip(plain, remembering, strict=True):
            assert list(map(one, keys(60, start))) == list(map(other, keys(60, start)))
            assert len(names) <= 100
    assert len(names) == 100


def test_a_name_that_is_remembered_is_not_made_again() -> None:
    name = RememberedNames(10).namer(SECRET, LAYOUT)
    first = name(keys(1)[0])
    assert name(keys(1)[0]) is first
    for key in keys(10, 1):
        name(key)
    assert name(keys(1)[0]) is not first
    assert name(keys(1)[0]) == first
