"""Machine code without line numbers: the same instructions, and nothing of the machine that made it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tilewright.tuning_db.env import compiling_environment

SCRIPT = """
import json, struct, sys
from tilewright.kernels import KERNELS, resolve_device
from tilewright.kernels.assemble import without_line_info
from tilewright.kernels.compile import compile_launch

def sections(cubin):
    start, = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    found = [struct.unpack_from("<IIQQQQ", cubin, start + index * size) for index in range(count)]
    texts = cubin[found[names][4]:][:found[names][5]]
    bodies = [cubin[each[4]:][:each[5]] if each[1] != 8 else each[5] for each in found]  # 8: of a size, without bytes
    return {texts[each[0]:].split(b"\\0")[0].decode(): body for each, body in zip(found, bodies)}

device = resolve_device(sys.argv[1])
found = []
for kernel in KERNELS:
    for _, problem, config in list(kernel.feature_cases)[:2]:
        for launch in kernel.launches(problem, config or kernel.default(problem, device)):
            binary = compile_launch(launch, device.arch)
            plain = without_line_info(binary)
            before, after = sections(binary.cubin), sections(plain.cubin)
            code = [name for name in before if name.startswith((".text.", ".nv.constant", ".nv.shared", ".nv.global"))]
            found.append({
                "code": bool(code) and all(before[name] == after[name] for name in code),
                "resources": binary.resources == plain.resources,
                "before": b".py" in binary.cubin,
                "after": any(text in plain.cubin for text in (b".py", b"/tmp", b"jit", b"triton")),
                "debug": [name for name in after if "debug_line" in name or "nv_debug" in name],
            })
print(json.dumps(found))
"""


@pytest.mark.parametrize("arch", ["sm_86", "sm_90", pytest.param("sm_120", marks=pytest.mark.slow)])
def test_the_instructions_are_those_that_were_measured_and_no_path_is_left(arch: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arch], env=compiling_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) >= 8
    for each in found:
        assert each == {"code": True, "resources": True, "before": True, "after": False, "debug": []}
