"""Pinned memory is pinned once, unpinned before it is unmapped, and done without where the
machine refuses."""

from __future__ import annotations

import ctypes
import gc
import logging
import threading
import time
import weakref

import pytest

from kvstore.device.pins import Pins
from tests.unit.device.fakes import FakeDriver


def mapping(nbytes: int = 4096) -> ctypes.Array[ctypes.c_ubyte]:
    return (ctypes.c_ubyte * nbytes)()


def view_of(pages: ctypes.Array[ctypes.c_ubyte]) -> memoryview:
    return memoryview(pages).cast("B")


def test_all_views_of_a_mapping_share_its_pin() -> None:
    driver = FakeDriver()
    pins = Pins(driver, in_background=False)
    pages = mapping()
    view = view_of(pages)
    assert pins.covers(view[10:20])
    assert pins.covers(view[100:].toreadonly())
    assert driver.registered == {ctypes.addressof(pages): 4096}
    pins.close()
    assert not driver.registered


def test_a_pin_is_undone_before_the_memory_is_unmapped() -> None:
    """A driver that still knew it would copy into whatever comes to lie there."""
    driver = FakeDriver()
    pins = Pins(driver, in_background=False)
    pages = mapping()
    order = []
    weakref.finalize(pages, lambda: order.append(("unmapped", dict(driver.registered))))
    view = view_of(pages)[5:9]
    assert pins.covers(view)
    del pages
    gc.collect()
    assert driver.registered
    del view
    gc.collect()
    assert order == [("unmapped", {})]
    pins.close()


def test_pinning_makes_nobody_wait() -> None:
    driver = FakeDriver()
    held, pages = threading.Event(), mapping()
    real = driver.register

    def register(address: int, nbytes: int) -> None:
        held.wait(10)
        real(address, nbytes)

    driver.register = register  # type: ignore[method-assign]
    pins = Pins(driver)
    assert not pins.covers(view_of(pages))
    held.set()
    deadline = time.monotonic() + 30
    while not pins.covers(view_of(pages)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    pins.close()
    assert not driver.registered


def test_a_machine_that_refuses_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    driver = FakeDriver()
    driver.refuses.add("register")
    pins = Pins(driver, in_background=False)
    several = [mapping() for _ in range(3)]
    with caplog.at_level(logging.WARNING):
        assert not any(pins.covers(view_of(pages)) for pages in several)
    assert driver.calls == ["register"]
    assert pins.refused
    assert len(caplog.records) == 1
    pins.close()


def test_memory_of_unknown_life_is_not_pinned() -> None:
    driver = FakeDriver()
    pins = Pins(driver, in_background=False)
    assert not pins.covers(memoryview(bytearray(64)))
    assert not driver.calls


def test_memory_that_goes_before_its_turn_is_not_pinned() -> None:
    driver = FakeDriver()
    held, first, second = threading.Event(), mapping(), mapping()
    real = driver.register

    def register(address: int, nbytes: int) -> None:
        held.wait(10)
        real(address, nbytes)

    driver.register = register  # type: ignore[method-assign]
    pins = Pins(driver)
    for pages in (first, second):
        pins.covers(view_of(pages))
    del pages, second
    held.set()
    deadline = time.monotonic() + 30
    while not pins.covers(view_of(first)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    pins.close()
    assert driver.calls.count("register") == 1
