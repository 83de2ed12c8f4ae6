"""Workloads from files of calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from tilewright.kernels import AttentionProblem, GemmProblem
from tilewright.tuner.suites import Workload, calls, read_calls
from tilewright.tuning_db.errors import UsageError

pytestmark = pytest.mark.smoke


def test_each_problem_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "calls.txt"
    path.write_text(
        "\ufeff# two servers\n\ngemm M=64,N=64,K=64\n  attention B=1,H=2,Sq=4,Skv=4,D=16,causal=true  \r\n"
        "gemm K=64,M=64,N=64\n"
    )
    product, attention = GemmProblem(64, 64, 64), AttentionProblem(B=1, H=2, Sq=4, Skv=4, D=16, causal=True)
    assert read_calls(path) == (
        Workload("M=64,N=64,K=64", product),
        Workload("B=1,H=2,Sq=4,Skv=4,D=16,causal=true", attention),
    )
    assert read_calls(str(path)) == read_calls(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "calls.txt has no calls: a program writes them there with TILEWRIGHT_CALLS="),
        (b"\n# nothing\n", "has no calls"),
        (b"# one\ngem M=64,N=64,K=64\n", "calls.txt, line 2: unknown op 'gem'; did you mean gemm?"),
        (b"gemm M=64,N=64\n", "calls.txt, line 1: 'gemm M=64,N=64' is no call: GemmProblem is missing K"),
        (b"gemm\n", "line 1: 'gemm' is no call: the text of a GemmProblem is empty"),
        (b"gemm M=0,N=64,K=64", "line 1: 'gemm M=0,N=64,K=64' is no call: M=0"),
        (b"gemm M=64\xff", "can't be read: the byte at 9 is no UTF-8"),
        (b"x" * 500, "line 1: unknown op"),
        (b"x" * 1001, "line 1: a line of 1001 characters is no call"),
        (b"#" * 2001, "has more than 0 MiB, which is no file of calls"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setattr(calls, "MOST_BYTES", 2000)
    path = tmp_path / "calls.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        read_calls(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300 + len(str(path))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file or directory")):
        with pytest.raises(UsageError, match=f"the calls in {path} can't be read: {reason}"):
            read_calls(path)
