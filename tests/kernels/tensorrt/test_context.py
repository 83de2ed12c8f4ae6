"""What plugins are built for, the numbers of tactics, and the identity of their timings."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.kernels.tensorrt.cases import case
from tilewright.kernels import Choice, GemmConfig, resolve_device
from tilewright.kernels.tensorrt import context
from tilewright.kernels.tensorrt.catalogue import find_plugin, plugin_attributes
from tilewright.kernels.tensorrt.context import Tactics, Target, current, evidence_stamp, identity, set_current
from tilewright.kernels.tensorrt.tactics import Tactic
from tilewright.tuning_db.env import DB_DIR
from tilewright.tuning_db.errors import UsageError

TARGET = Target(resolve_device("rtx3090"), "12.8", 8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(DB_DIR, str(tmp_path))
    monkeypatch.setattr(context, "_current", None)
    return tmp_path


class Evidence(list):
    """How often it was asked for, too."""

    times = 0


@pytest.fixture
def evidence(monkeypatch):
    """The configurations that are known for each case, and the names of their kernels."""
    known = Evidence()

    def tactics(*_, **__):
        known.times += 1
        return [
            Tactic(int(name[1:]), SimpleNamespace(config=config), SimpleNamespace(name=name)) for config, name in known
        ]

    monkeypatch.setattr(context, "tactics", tactics)
    return known


def gemm(*m, **attributes):
    return case("FusedGemm", [((list(m), 64), "fp16"), ((64, 64), "fp16")], **attributes)


def configs(found):
    return {tactic.number: tactic.choice.config for tactic in found}


def test_nothing_is_known_before_it_is_said():
    with pytest.raises(UsageError, match=r"the plugins are not registered: call .*register\(\) first"):
        current()


def test_the_same_target_keeps_what_is_known():
    set_current(TARGET)
    first = current()
    set_current(Target(TARGET.device, "12.8", 8))
    assert current() is first
    set_current(Target(TARGET.device, "12.4", 8))
    assert current() is not first


def test_a_second_profile_adds_to_what_is_known(evidence):
    tactics = Tactics(TARGET)
    evidence[:] = [("one", "k1"), ("two", "k2")]
    assert configs(tactics.of(gemm(1, 8, 16))) == {1: "one", 2: "two"}
    evidence[:] = [("three", "k3"), ("two", "k2")]
    assert configs(tactics.of(gemm(1, 800, 1600))) == {3: "three", 2: "two"}
    # One configuration, and yet another kernel: TensorRT keeps kernels by number.
    evidence[:] = [("two", "k4")]
    assert configs(tactics.of(gemm(1, 9, 16))) == {4: "two"}
    assert tactics.get(gemm(1, 8, 16), 3).plan.name == "k3"


def test_evidence_is_asked_once_for_each_profile_until_it_changes(evidence, folder):
    tactics = Tactics(TARGET)
    evidence[:] = [("one", "k1")]
    for largest in (16, 16, 32, 16):
        tactics.of(gemm(1, 8, largest))
    assert evidence.times == 2
    evidence[:] = [("two", "k2"), ("one", "k1")]
    (folder / "rtx3090-82sm.sqlite").write_bytes(b"records")
    assert configs(tactics.of(gemm(1, 8, 16))) == {2: "two", 1: "one"}
    evidence[:] = []
    (folder / "rtx3090-82sm.sqlite").write_bytes(b"other records")
    assert tactics.of(gemm(1, 8, 16)) == []
    # A build that has begun goes on with the kernels that it was told of.
    assert [tactics.get(gemm(1, 8, 16), number).choice.config for number in (1, 2)] == ["one", "two"]


def test_what_a_build_asked_is_described(evidence, monkeypatch):
    tactics = Tactics(TARGET)
    choice = Choice(GemmConfig(64, 64, 32), None, "named", 3.5)
    evidence[:] = [("one", "k1")]
    tactics.of(gemm(1, 8, 16))
    tactics.note_failure(ValueError("of another build"))
    tactics.begin()
    assert (tactics.described(), tactics.take_failure()) == ([], None)
    errors = [ValueError("the first"), ValueError("what followed from it")]
    for error in errors:
        tactics.note_failure(error)
    assert tactics.take_failure() is errors[0]
    assert tactics.take_failure() is None
    made = Tactic(1, choice, SimpleNamespace(name="k"))
    monkeypatch.setattr(context, "tactics", lambda *_, **__: [made])
    tactics.of(gemm(1, 8, 16, activation="relu"))
    (found,) = tactics.described()
    assert (found["plugin"], found["attributes"]["activation"]) == ("FusedGemm", "relu")
    assert found["inputs"] == ["a: fp16[?, 64] LINEAR", "b: fp16[64, 64] LINEAR"]
    assert found["outputs"] == ["out: fp16[?, 64] LINEAR"]
    assert found["tactics"]["1"] == {
        "config": choice.config.to_dict(),
        "provenance": "default",
        "reason": "named",
        "time_us": 3.5,
        "kernel": "k",
    }


def test_other_attributes_have_numbers_of_their_own(evidence):
    tactics = Tactics(TARGET)
    evidence[:] = [("one", "k1")]
    tactics.of(gemm(1, 8, 16))
    evidence[:] = [("two", "k2")]
    assert configs(tactics.of(gemm(1, 8, 16, activation="relu"))) == {2: "two"}
    assert tactics.get(gemm(1, 8, 16), 1).choice.config == "one"


def test_a_number_that_nobody_gave(evidence):
    evidence[:] = [("one", "k1")]
    tactics = Tactics(TARGET)
    assert tactics.get(gemm(1, 8, 16), 1).choice.config == "one"  # as the evidence has it, without being asked before
    with pytest.raises(
        UsageError, match=r"FusedGemm has no tactic 7 on rtx3090 \(it has 1\): the timing cache is of another"
    ):
        tactics.get(gemm(1, 8, 16), 7)


def test_the_identity_of_timings(folder):
    def of(name="FusedGemm", target=TARGET, **attributes):
        return identity(find_plugin(name), plugin_attributes(name, **attributes), target)

    first = of()
    assert first == of()
    others = {of("FusedGemmBias"), of(activation="relu"), of(target=Target(resolve_device("a10"), "12.8", 8))}
    others |= {of(target=Target(TARGET.device, "12.4", 8)), of(target=Target(TARGET.device, "12.8", 4))}
    (folder / "rtx3090-82sm.sqlite").write_bytes(b"records")
    others.add(of())
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    assert of(target=replace(TARGET, db=elsewhere)) == first
    (elsewhere / "rtx3090-82sm.sqlite").write_bytes(b"other records")
    others.add(of(target=replace(TARGET, db=elsewhere)))
    assert len({first, *others}) == 8


def test_the_identity_changes_with_the_kernels(monkeypatch):
    plugin = find_plugin("FusedGemm")
    first = identity(plugin, plugin_attributes("FusedGemm"), TARGET)
    monkeypatch.setattr(context, "code_hash", lambda kernel: "another")
    assert identity(plugin, plugin_attributes("FusedGemm"), TARGET) != first


def test_shipped_records_are_evidence_too(folder, monkeypatch):
    first = evidence_stamp(folder)
    (folder / "shipped").mkdir()
    (folder / "shipped" / "a10-72sm.sqlite").write_bytes(b"records")
    monkeypatch.setattr(context, "shipped_paths", lambda: list((folder / "shipped").iterdir()))
    assert evidence_stamp(folder) != first


def test_evidence_changes_with_what_is_written_not_with_who_reads(folder, monkeypatch):
    monkeypatch.setattr(context, "shipped_paths", list)
    assert evidence_stamp(folder) == ""
    file = folder / "a10-72sm.sqlite"
    file.write_bytes(b"one")
    first = evidence_stamp(folder)
    (folder / "a10-72sm.sqlite-wal").touch()
    (folder / "a10-72sm.sqlite-shm").write_bytes(b"index")
    assert evidence_stamp(folder) == first
    (folder / "a10-72sm.sqlite-wal").write_bytes(b"more")
    second = evidence_stamp(folder)
    os.utime(file, (1, 1))
    assert len({first, second, evidence_stamp(folder)}) == 3
