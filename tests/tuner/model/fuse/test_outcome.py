from __future__ import annotations

import onnx_ir as ir

from tilewright.tuner.model.fuse.outcome import FusionReport, Log, Match, Miss


def test_a_miss_is_noted_once_and_gone_when_it_matches_after_all():
    log = Log()
    log.miss("gemm + bias", "a", "first reason")
    log.miss("gemm + bias", "a", "later reason")
    log.miss("gemm + bias", "b", "another")
    log.match("gemm + bias", "b")
    assert list(log.misses.values()) == [Miss("gemm + bias", "a", "later reason")]
    assert log.matches == [Match("gemm + bias", "b")]


def test_a_miss_is_gone_with_the_node_that_it_is_about():
    nodes = [ir.node("Add", [], num_outputs=1) for _ in range(2)]
    graph = ir.Graph([], [], nodes=nodes, name="g")
    log = Log()
    log.miss("gemm + bias", "a", "no bias", after=nodes[0])
    log.miss("gemm + bias", "b", "no bias", after=nodes[1])
    log.miss("gemm + residual", "b", "first of a node, then of none", after=nodes[1])
    log.miss("gemm + residual", "b", "later reason")
    log.miss("attention", "a", "why")
    log.settle()
    assert len(log.misses) == 4
    graph.remove(nodes)
    log.settle()
    assert [*log.misses.values()] == [Miss("gemm + residual", "b", "later reason"), Miss("attention", "a", "why")]


def test_counts_are_by_pattern():
    matches = (Match("two", "a"), Match("one", "a"), Match("two", "b"))
    report = FusionReport(matches, (Miss("one", "c", "why"),), 9, 4, {"a": "FusedGemm"}, {"a": "its end"})
    assert list(report.counts().items()) == [("one", 1), ("two", 2)]
    assert report.to_dict()["left"] == [{"pattern": "one", "node": "c", "reason": "why"}]
