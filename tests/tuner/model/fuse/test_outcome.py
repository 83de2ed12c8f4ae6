from __future__ import annotations

from tilewright.tuner.model.fuse.outcome import FusionReport, Log, Match, Miss


def test_a_miss_is_noted_once_and_gone_when_it_matches_after_all():
    log = Log()
    log.miss("gemm + bias", "a", "first reason")
    log.miss("gemm + bias", "a", "later reason")
    log.miss("gemm + bias", "b", "another")
    log.match("gemm + bias", "b")
    assert list(log.misses.values()) == [Miss("gemm + bias", "a", "later reason")]
    assert log.matches == [Match("gemm + bias", "b")]


def test_counts_are_by_pattern():
    matches = (Match("two", "a"), Match("one", "a"), Match("two", "b"))
    report = FusionReport(matches, (Miss("one", "c", "why"),), 9, 4, {"a": "FusedGemm"}, {"a": "its end"})
    assert list(report.counts().items()) == [("one", 1), ("two", 2)]
    assert report.to_dict()["left"] == [{"pattern": "one", "node": "c", "reason": "why"}]
