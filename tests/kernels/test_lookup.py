"""Which configuration a problem gets, and on what evidence."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest

from tilewright.kernels import KERNELS, Choice, GemmConfig, GemmProblem, RmsNormProblem, choose, resolve_device
from tilewright.kernels import lookup as lookup_module
from tilewright.kernels.lookup import (
    TIMING_PROTOCOL,
    candidates,
    code_hash,
    fitting_config,
    lighter_configs,
    predicted_best,
    prediction_protocol,
    record_key,
    shortlist,
)
from tilewright.kernels.ops.conv2d.launch import CONV2D
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.pack import Entry, Facts, write_pack
from tilewright.kernels.prediction import MODEL
from tilewright.tuning_db.env import DB_DIR, FROZEN, PACK, SHIPPED, compiling_environment, database_dir
from tilewright.tuning_db.errors import IllegalConfigError, NotPackedError, PackError, UnsupportedError, UsageError
from tilewright.tuning_db.file import path_for
from tilewright.tuning_db.record import Environment, Provenance, Record, Resources, Status, Times, canonical_json
from tilewright.tuning_db.store import TuningDB

DEVICE, A10, A100 = (resolve_device(name) for name in ("rtx3090", "a10", "a100"))
PROBLEM = GemmProblem(128, 4096, 4096)
MODEST = Resources(registers=128, spill_bytes=0, stack_bytes=0, shared_bytes=32768)
TILES = [GemmConfig(64, 64, 32, GROUP_M=group) for group in range(1, 10)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(DB_DIR, str(tmp_path))
    return tmp_path


@pytest.fixture
def shipped(tmp_path_factory, monkeypatch):
    """The folder of the shipped files."""
    folder = tmp_path_factory.mktemp("shipped")
    monkeypatch.setenv(SHIPPED, str(folder))
    return folder


@pytest.fixture
def add(folder):
    """Puts a record into the database of its device."""

    def add(
        config,
        problem=PROBLEM,
        device=DEVICE,
        time_us=10.0,
        measured=True,
        resources=MODEST,
        text=None,
        folder=folder,
        **key,
    ):
        key |= {"problem": text} if text else {}
        protocol = TIMING_PROTOCOL if measured else prediction_protocol(GEMM)
        record = Record(
            key=replace(record_key(GEMM, problem, device, protocol), **key),
            config=config if isinstance(config, str) else config.to_json(),
            status=Status.OK,
            provenance=Provenance.MEASURED if measured else Provenance.PREDICTED,
            times=Times.single(time_us),
            resources=resources,
        )
        with TuningDB.open(device.key, folder) as database:
            run = database.start_run(Environment("0", "3.9.0", "12", "3.11", "here", protocol))
            database.add(record, run)

    return add


@pytest.fixture
def unpredicted(monkeypatch):
    """No configuration is predicted: whatever is chosen is a record or the default."""
    monkeypatch.setattr(lookup_module, "predicted_best", lambda *_, apart: [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kernel": "gemm"}, r"kernel='gemm' must be a Kernel, as find_kernel\('gemm'\) gives one"),
        ({"problem": "M=64"}, "problem='M=64' must be a GemmProblem for gemm: GemmProblem.parse reads a text"),
        ({"problem": RmsNormProblem(16, 64)}, "problem=RmsNormProblem.* must be a GemmProblem for gemm"),
        ({"device": "a10"}, r"device='a10' must be a Device, as resolve_device\('a10'\) gives one"),
        ({"config": {}}, "config={} must be a GemmConfig for gemm"),
    ],
)
def test_arguments_of_other_kinds_are_told(given, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        choose(**({"kernel": GEMM, "problem": PROBLEM, "device": DEVICE} | given))


def test_the_order_of_evidence(add, monkeypatch):
    predicted = choose(GEMM, PROBLEM, DEVICE)
    assert predicted.provenance is Provenance.PREDICTED
    assert (predicted.record, predicted.reason) == (None, f"by {MODEL}")
    assert predicted.time_us > 0
    # Each is better evidence than all before it, and none of them the faster for it: beyond noise, of one problem.
    add(TILES[0], measured=False, time_us=1)
    assert choose(GEMM, PROBLEM, DEVICE).config == TILES[0]
    assert choose(GEMM, PROBLEM, DEVICE).provenance is Provenance.PREDICTED
    add(TILES[1], device=A10, time_us=2)
    assert choose(GEMM, PROBLEM, DEVICE).config == TILES[1]
    assert choose(GEMM, PROBLEM, DEVICE).reason == f"board {A10.key}"
    add(TILES[2], problem=replace(PROBLEM, M=256), time_us=3)
    assert choose(GEMM, PROBLEM, DEVICE).config == TILES[2]
    assert choose(GEMM, PROBLEM, DEVICE).reason == "near shape M=128→256"
    add(TILES[3], kernel_hash="another", time_us=5.8)
    assert choose(GEMM, PROBLEM, DEVICE).config == TILES[3]
    assert choose(GEMM, PROBLEM, DEVICE).provenance is Provenance.TRANSFERRED
    add(TILES[4], triton="3.5.1", time_us=5.9)
    assert choose(GEMM, PROBLEM, DEVICE).config == TILES[4]
    assert choose(GEMM, PROBLEM, DEVICE).reason == "other toolchain"
    add(TILES[5], time_us=6)
    measured = choose(GEMM, PROBLEM, DEVICE)
    assert (measured.config, measured.provenance, measured.time_us) == (TILES[5], Provenance.MEASURED, 6)
    assert measured.record.config == TILES[5].to_json()
    named = choose(GEMM, PROBLEM, DEVICE, config=TILES[6])
    assert named == Choice(TILES[6], None, "named by the caller")


def test_what_an_earlier_revision_measured_without_a_field_is_known_again(add):
    fields = json.loads(TILES[1].to_json())
    del fields["PAIRS"]
    add(TILES[0], time_us=10)
    add(TILES[1], time_us=20)
    add(canonical_json(fields), kernel_hash="another", time_us=5)
    assert choose(GEMM, PROBLEM, DEVICE).config == TILES[0]


def test_without_any_evidence_the_default(unpredicted):
    assert choose(GEMM, PROBLEM, DEVICE) == Choice(GEMM.default(PROBLEM, DEVICE), Provenance.DEFAULT, "no evidence")


def test_after_all_evidence_comes_the_default_and_what_is_lighter(add):
    add(TILES[0])
    first, *predicted, default, light, lighter, lightest = candidates(GEMM, PROBLEM, DEVICE)
    assert first.provenance is Provenance.MEASURED
    assert [choice.provenance for choice in predicted] == [Provenance.PREDICTED] * 4
    times = [choice.time_us for choice in predicted]
    assert times == sorted(times)
    assert default == Choice(GEMM.default(PROBLEM, DEVICE), Provenance.DEFAULT, "no evidence")
    for choice in (light, lighter, lightest):
        assert (choice.provenance, choice.reason) == (Provenance.DEFAULT, "no evidence, and the default can't run")
        assert GEMM.space.fits(PROBLEM, choice.config, DEVICE) is None

    def registers(choice):
        return GEMM.estimate(PROBLEM, choice.config, DEVICE).registers

    assert 0.75 * registers(default) >= registers(light) > 0.5 * registers(default) >= registers(lighter)
    least = min(GEMM.estimate(PROBLEM, config, DEVICE).registers for config in GEMM.space.configs(PROBLEM, DEVICE))
    assert registers(lighter) > registers(lightest) >= least


def test_nothing_is_lighter_than_the_lightest():
    lightest = lighter_configs(GEMM, PROBLEM, DEVICE)[-1]
    kernel = replace(GEMM, default=lambda problem, device: lightest)
    assert lighter_configs(kernel, PROBLEM, DEVICE) == []


def test_the_shortlist_has_every_record_of_the_problem(add, folder, shipped):
    def configs(count=8, usable=None):
        return [choice.config for choice in shortlist(GEMM, PROBLEM, DEVICE, folder, count, usable)]

    guesses = configs()
    lighter = lighter_configs(GEMM, PROBLEM, DEVICE)
    assert [*guesses, *lighter] == [choice.config for choice in candidates(GEMM, PROBLEM, DEVICE)]
    add(TILES[3], problem=replace(PROBLEM, M=256), time_us=1)
    # What is carried over has no records beside it: those are of another problem.
    assert configs() == [TILES[3], *guesses]
    for config, time_us in ((TILES[0], 30), (TILES[1], 10), (TILES[2], 20)):
        add(config, time_us=time_us)
    assert configs() == [TILES[1], TILES[1], TILES[2], TILES[0], *guesses]
    assert configs(2) == [TILES[1], TILES[1], TILES[2], *guesses]
    add(TILES[4], time_us=1, resources=replace(MODEST, spill_bytes=4))
    add(TILES[5], time_us=1, measured=False)
    assert configs() == [TILES[1], TILES[1], TILES[2], TILES[0], TILES[5], *guesses]
    add(TILES[6], time_us=9.9, folder=shipped)
    assert configs() == [TILES[1], TILES[1], TILES[2], TILES[0], TILES[6], TILES[5], *guesses]
    add(TILES[7], time_us=50, kernel_hash="another")
    add(TILES[8], time_us=0.5, device=A10)
    assert configs() == [TILES[1], TILES[1], TILES[2], TILES[0], TILES[7], TILES[6], TILES[5], *guesses]
    # What can't be used counts for nothing, and makes room.
    assert configs(2, lambda config: config not in TILES[:3]) == [TILES[7], TILES[7], TILES[6], *guesses]
    predicted = [TILES[0]]  # is in the space, too
    assert configs(8, lambda config: config in TILES[:2]) == [TILES[1], TILES[1], TILES[0], *predicted]
    assert configs(8, lambda config: False) == []


def test_predictions_are_the_fastest_of_the_space(monkeypatch):
    space = GEMM.space.configs(PROBLEM, DEVICE)[:200]
    kernel = replace(GEMM, space=replace(GEMM.space, axes={"BLOCK_M": (), "BLOCK_N": ()}))
    monkeypatch.setattr(type(kernel.space), "configs", lambda *_, **__: space)
    best = predicted_best(kernel, PROBLEM, DEVICE, 201)
    whole = {*space, kernel.default(PROBLEM, DEVICE)}  # which a coarse space may lack
    assert sorted(config.to_json() for _, config in best) == sorted(config.to_json() for config in whole)
    times = [prediction.time_us for prediction, _ in best]
    assert times == sorted(times)
    assert [config for _, config in predicted_best(kernel, PROBLEM, DEVICE, 3)] == [config for _, config in best[:3]]


def test_the_whole_space_is_looked_at_where_little_of_the_coarse_one_is_usable():
    every = predicted_best(GEMM, PROBLEM, DEVICE, 10_000, lambda config: True)
    assert {config for _, config in every} == {*GEMM.space.configs(PROBLEM, DEVICE), GEMM.default(PROBLEM, DEVICE)}
    coarse = set(GEMM.space.configs(PROBLEM, DEVICE, coarse=True))
    found = predicted_best(GEMM, PROBLEM, DEVICE, 3, lambda config: config not in coarse)
    assert found == [pair for pair in every if pair[1] not in coarse][:3]
    some = predicted_best(GEMM, PROBLEM, DEVICE, 3, lambda config: config.num_warps == 4)
    assert some == [pair for pair in predicted_best(GEMM, PROBLEM, DEVICE, 10**6) if pair[1].num_warps == 4][:3]


def test_candidates_take_other_registers_or_warps_each():
    """Where the code of one spills, that of those that take as many would too."""
    found = predicted_best(GEMM, PROBLEM, DEVICE, 4, apart=True)
    takes = [(GEMM.estimate(PROBLEM, config, DEVICE).registers, config.num_warps) for _, config in found]
    assert len(set(takes)) == len(takes) == 4
    every = predicted_best(GEMM, PROBLEM, DEVICE, 10_000)
    assert found[0] == every[0]
    firsts = {}
    for pair in every:
        firsts.setdefault((GEMM.estimate(PROBLEM, pair[1], DEVICE).registers, pair[1].num_warps), pair)
    assert found == list(firsts.values())[:4]


def test_the_callers_configuration_is_checked_and_nothing_takes_its_place(add):
    add(TILES[0])
    with pytest.raises(IllegalConfigError, match="BLOCK_M=24 must be a power of two"):
        choose(GEMM, PROBLEM, DEVICE, config=GemmConfig(24, 16, 16))


@pytest.mark.parametrize(
    ("kernel", "text"),
    [(GEMM, "M=1,N=1,K=2147483647,dtype=int8"), (CONV2D, "N=3,H=26755,W=26755,C=1,K=1,R=1,S=3,pad_right=2,dtype=int8")],
    ids=["gemm", "conv2d"],
)
def test_what_fits_no_configuration_is_refused(kernel, text):
    """Not even the default is chosen, by prediction or without: its positions would wrap around."""
    problem = kernel.problem.parse(text)
    assert kernel.space.fits(problem, kernel.default(problem, DEVICE), DEVICE) is not None
    said = rf"^{kernel.name} {text} fits no configuration on {DEVICE.board}: "
    with pytest.raises(UnsupportedError, match=said) as raised:
        choose(kernel, problem, DEVICE)
    assert isinstance(raised.value, NotImplementedError)


def test_a_problem_the_device_lacks_is_refused_before_anything_is_asked(folder):
    with pytest.raises(UnsupportedError, match=r"^gemm M=16,N=16,K=32,dtype=fp8e4m3: fp8e4m3 needs sm_89"):
        choose(GEMM, GemmProblem(16, 16, 32, dtype="fp8e4m3"), DEVICE, config=GemmConfig(16, 16, 32))


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize(
    "unfit",
    [
        {"resources": replace(MODEST, shared_bytes=101377)},
        {"resources": replace(MODEST, registers=255), "config": replace(TILES[0], num_warps=16)},
        {"resources": replace(MODEST, spill_bytes=4)},
        {"config": GemmConfig(256, 256, 64)},  # more accumulators than registers
        {"config": GemmConfig(128, 128, 64, num_stages=5)},  # more shared memory than a block of this arch has
        {"config": '{"BLOCK_M":64}'},
        {"config": '{"BLOCK_M":64,"BLOCK_N":64,"BLOCK_K":32,"BLOCK_Z":true}'},
        {"config": '{"BLOCK_M":64,"BLOCK_N":"64","BLOCK_K":32}'},
    ],
    ids=str,
)
def test_records_that_do_not_fit_are_passed_over(add, unpredicted, unfit, measured):
    add(**({"config": TILES[0], "time_us": 1, "measured": measured} | unfit))
    assert choose(GEMM, PROBLEM, DEVICE).provenance is Provenance.DEFAULT
    add(TILES[1], time_us=50, measured=measured)
    assert choose(GEMM, PROBLEM, DEVICE).config == TILES[1]


def test_what_fits_the_larger_board_of_another_arch_is_no_answer(add, unpredicted):
    add(TILES[0], device=A100)
    assert choose(GEMM, PROBLEM, DEVICE).provenance is Provenance.DEFAULT
    assert choose(GEMM, PROBLEM, A100).provenance is Provenance.MEASURED


def test_a_record_without_resources_is_judged_by_the_space_alone(add):
    add(TILES[0])
    record = replace(choose(GEMM, PROBLEM, DEVICE).record, resources=None)
    assert fitting_config(GEMM, PROBLEM, DEVICE, record) == TILES[0]
    assert fitting_config(GEMM, PROBLEM, DEVICE, replace(record, config="{}")) is None
    # The database never answers what spills; a record from elsewhere is held to it too.
    assert fitting_config(GEMM, PROBLEM, DEVICE, replace(record, resources=replace(MODEST, spill_bytes=4))) is None


@pytest.mark.parametrize(
    "problem",
    [
        replace(PROBLEM, M=128 * 32),  # five doublings away
        replace(PROBLEM, dtype="bf16"),
        replace(PROBLEM, N=4095),
        replace(PROBLEM, activation="relu"),
    ],
    ids=str,
)
def test_strangers_answer_nothing(add, unpredicted, problem):
    add(TILES[0], problem=problem)
    assert choose(GEMM, PROBLEM, DEVICE).provenance is Provenance.DEFAULT


def test_a_problem_of_another_revision_answers_nothing(add, unpredicted):
    text = replace(PROBLEM, M=256).to_json()
    for changed in (
        '{"M":256}',
        "[]",
        text.replace('"M":256', '"L":3,"M":256'),
        text.replace('"strided":false', '"x":1'),
    ):
        add(TILES[0], text=changed)
    # All fields are there, or have defaults, yet not the same ones: a default may have meant something else then.
    add(TILES[0], text=text.replace(',"strided":false', ""))
    assert choose(GEMM, PROBLEM, DEVICE).provenance is Provenance.DEFAULT
    add(TILES[1], text=text)
    assert choose(GEMM, PROBLEM, DEVICE).config == TILES[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"no database at all" * 100),
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.unlink() or path.mkdir(),
    ],
    ids=["garbage", "cut short", "a folder"],
)
def test_a_damaged_database_answers_nothing_and_stays_as_it_is(add, unpredicted, folder, damage):
    add(TILES[0])
    path = path_for(DEVICE.key, folder)
    damage(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.warns(RuntimeWarning, match="Its records are left out"):
        assert choose(GEMM, PROBLEM, DEVICE).provenance is Provenance.DEFAULT
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_fresh_installation_answers_from_the_shipped_records(add, folder, shipped):
    add(TILES[0], time_us=7, folder=shipped)
    add(TILES[1], problem=replace(PROBLEM, M=4096), time_us=200, triton="3.5.1", folder=shipped)
    choice = choose(GEMM, PROBLEM, DEVICE)
    assert (choice.config, choice.provenance, choice.reason) == (TILES[0], Provenance.MEASURED, "exact, shipped")
    assert choice.time_us == 7
    assert choose(GEMM, replace(PROBLEM, M=256), DEVICE).reason == "near shape M=256→128, shipped"
    assert choose(GEMM, PROBLEM, A10).reason == f"board {DEVICE.key}, shipped"
    other = choose(GEMM, replace(PROBLEM, M=4096), DEVICE)
    assert (other.provenance, other.reason) == (Provenance.TRANSFERRED, "other toolchain, shipped")
    assert list(folder.iterdir()) == []


def test_what_was_tuned_here_goes_before_what_was_shipped(add, shipped):
    add(TILES[0], time_us=8.7, folder=shipped)
    add(TILES[1], time_us=9)
    assert next(candidates(GEMM, PROBLEM, DEVICE)).config == TILES[1]
    add(TILES[3], time_us=5, folder=shipped)  # nobody tried it here
    assert choose(GEMM, PROBLEM, DEVICE).reason == "exact"
    add(TILES[2], problem=replace(PROBLEM, M=256), measured=False, time_us=9)
    assert choose(GEMM, replace(PROBLEM, M=256), DEVICE).provenance is Provenance.TRANSFERRED


@pytest.mark.parametrize("triton", ["3.5.1", None])
def test_shipped_records_are_held_to_the_limits_of_the_device(add, shipped, unpredicted, triton):
    toolchain = {"triton": triton} if triton else {}
    for tile, resources in enumerate(
        (replace(MODEST, shared_bytes=DEVICE.shared_per_block + 1), replace(MODEST, registers=1024), MODEST)
    ):
        add(TILES[tile], time_us=1 + tile, resources=resources, folder=shipped, **toolchain)
    assert choose(GEMM, PROBLEM, DEVICE).config == TILES[2]
    add(TILES[2], resources=replace(MODEST, spill_bytes=8), folder=shipped, **toolchain)
    assert choose(GEMM, PROBLEM, DEVICE).provenance is Provenance.DEFAULT


def test_where_ones_own_database_is_damaged_the_shipped_records_answer(add, folder, shipped):
    add(TILES[0], folder=shipped)
    path_for(DEVICE.key, folder).write_bytes(b"garbage" * 1000)
    with pytest.warns(RuntimeWarning, match="is damaged or no database .*Its records are left out"):
        assert choose(GEMM, PROBLEM, DEVICE).reason == "exact, shipped"
    path_for(DEVICE.key, folder).unlink()
    path_for(DEVICE.key, shipped).write_bytes(b"garbage" * 1000)
    with pytest.warns(RuntimeWarning, match="shipped with tilewright can't be read and are left out"):
        assert choose(GEMM, PROBLEM, DEVICE).provenance is Provenance.PREDICTED
    add(TILES[1], device=A10)
    with pytest.warns(RuntimeWarning, match="left out"):
        assert choose(GEMM, PROBLEM, DEVICE).reason == f"board {A10.key}"


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        (
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('tilewright', 's0999_x', '')",
            "newer",
        ),
        ("DELETE FROM _sqlite_migrations WHERE name > 's0002'", "an older Tilewright"),
        ("UPDATE records SET message = CAST(x'ff41' AS TEXT)", "a text that is not valid"),
        ("UPDATE records SET registers = 'x'", "record 1 is no record .registers='x' is no integer.: delete that row"),
    ],
)
def test_what_ones_own_database_can_no_longer_answer_is_told(add, folder, unpredicted, statement, reason):
    add(TILES[0])
    with closing(sqlite3.connect(path_for(DEVICE.key, folder))) as raw, raw:
        raw.execute(statement)
    with pytest.warns(RuntimeWarning, match=reason):
        assert choose(GEMM, PROBLEM, DEVICE).provenance is Provenance.DEFAULT


def test_a_broken_shipped_file_is_one_line_of_a_program(folder, shipped):
    path_for(DEVICE.key, shipped).write_bytes(b"garbage" * 1000)
    program = f"""
from tilewright.kernels import GemmProblem, choose, resolve_device
from tilewright.kernels.ops.gemm.launch import GEMM
for rows in (64, 128, 64):
    choose(GEMM, GemmProblem(rows, 4096, 4096), resolve_device({DEVICE.board!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], env=compiling_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("left out") == 1


@pytest.mark.parametrize("ask", [choose, lambda *asked: list(shortlist(*asked, database_dir(), 1))])
def test_a_program_is_told_once_of_folders_that_are_none(tmp_path, monkeypatch, ask, unpredicted):
    monkeypatch.setattr(lookup_module, "_looked_at_folders", False)
    (tmp_path / "file").touch()
    monkeypatch.setenv(DB_DIR, str(tmp_path / "file"))
    monkeypatch.setenv(SHIPPED, str(tmp_path / "absent"))
    with pytest.warns(RuntimeWarning) as told:
        assert all(ask(GEMM, replace(PROBLEM, M=rows), DEVICE) for rows in (64, 128))
    assert [str(each.message) for each in told] == [
        f"TILEWRIGHT_SHIPPED={tmp_path}/absent is no folder: nothing that was shipped is found (0 leaves it out)",
        f"{tmp_path}/file is a file, where the folder of databases should be (TILEWRIGHT_DB_DIR): nothing that was "
        "tuned is found",
    ]


def test_a_program_of_a_user_without_a_home_goes_on(shipped, add, monkeypatch, unpredicted):
    add(TILES[0], folder=shipped)
    for name in (DB_DIR, "HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.warns(RuntimeWarning, match=f"--db or {DB_DIR}, and .* home.*: nothing that was tuned is found"):
        choice = choose(GEMM, PROBLEM, DEVICE)
    assert choice.reason == "exact, shipped"


def test_many_processes_at_once_are_answered(add, folder, shipped):
    add(TILES[0], folder=shipped)
    before = sorted(shipped.iterdir())
    program = f"""
import json
from tilewright.kernels import GemmProblem, choose, resolve_device
from tilewright.kernels.ops.gemm.launch import GEMM
choice = choose(GEMM, GemmProblem.from_json({PROBLEM.to_json()!r}), resolve_device({DEVICE.board!r}))
print(json.dumps([choice.config.to_json(), choice.reason]))
"""
    started = [
        subprocess.Popen([sys.executable, "-c", program], env=compiling_environment(), stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    for process in started:
        out, _ = process.communicate(timeout=120)
        assert json.loads(out) == [TILES[0].to_json(), "exact, shipped"]
    assert sorted(shipped.iterdir()) == before
    assert list(folder.iterdir()) == []


def test_another_boards_damage_harms_nothing(add, folder):
    add(TILES[0])
    path_for(A10.key, folder).write_bytes(b"garbage" * 1000)
    assert choose(GEMM, PROBLEM, DEVICE).config == TILES[0]
    assert choose(GEMM, replace(PROBLEM, M=256), DEVICE).config == TILES[0]


def test_looking_up_writes_nothing(folder):
    choose(GEMM, PROBLEM, DEVICE)
    assert list(folder.iterdir()) == []


def test_a_key_is_in_plain_values():
    """What changes it is in test_key.py."""
    key = record_key(GEMM, PROBLEM, DEVICE)
    assert (key.op, key.problem, key.device, key.arch) == ("gemm", PROBLEM.to_json(), "rtx3090-82sm", 86)
    assert key.protocol == TIMING_PROTOCOL
    assert key.triton.startswith("3.")
    assert key.ptxas.count(".") == 2
    assert len(key.kernel_hash) == 64


def test_predictions_are_another_protocol_when_what_an_op_tells_of_itself_changes(monkeypatch):
    protocols = {kernel.name: prediction_protocol(kernel) for kernel in KERNELS}
    assert len(set(protocols.values())) == len(KERNELS)
    assert all(protocol.startswith(f"{MODEL}-") for protocol in protocols.values())
    hashed = lookup_module.module_hash
    monkeypatch.setattr(
        lookup_module, "module_hash", lambda module: hashed(module) + module.__name__.rpartition(".")[2]
    )
    assert prediction_protocol(replace(GEMM)) != protocols["gemm"]  # a copy: that of the registered one is remembered


@pytest.mark.parametrize("module", ["prediction", "catalogue", "device", "space"])
def test_predictions_are_another_protocol_when_the_model_or_a_boards_figures_change(monkeypatch, module):
    hashed, before = lookup_module.module_hash, prediction_protocol(replace(GEMM))
    monkeypatch.setattr(
        lookup_module,
        "module_hash",
        lambda each: "changed" if each.__name__ == f"tilewright.kernels.{module}" else hashed(each),
    )
    assert prediction_protocol(replace(GEMM)) != before


@pytest.fixture
def pack(folder, monkeypatch):
    """A pack that has PROBLEM with a configuration, made by `pack(config)`; named by the variable."""

    def make(config, device=DEVICE, revision=None):
        path = folder / f"{len(list(folder.iterdir()))}.pack"
        facts = Facts(device.key, device.arch, "0", "3.9.0", "12", {"gemm": revision or code_hash(GEMM)})
        text = config if isinstance(config, str) else config.to_json()
        entry = Entry("gemm", PROBLEM.to_json(), text, Provenance.MEASURED, "exact", 3.0)
        with path.open("wb") as stream:
            write_pack(stream, facts, [entry], {})
        monkeypatch.setenv(PACK, str(path))
        return path

    return make


def test_a_pack_goes_before_all_but_the_callers_own(add, pack, monkeypatch):
    add(TILES[1])
    pack(TILES[0])
    first, second, *_ = candidates(GEMM, PROBLEM, DEVICE)
    assert (first.config, first.provenance, first.reason) == (TILES[0], Provenance.MEASURED, "packed: exact")
    assert (first.time_us, second.config) == (3.0, TILES[1])
    assert choose(GEMM, PROBLEM, DEVICE, config=TILES[2]).config == TILES[2]
    other = replace(PROBLEM, activation="relu")
    assert choose(GEMM, other, DEVICE).reason != "packed: exact"


def test_for_a_frozen_process_the_pack_is_where_it_ends(add, pack, monkeypatch):
    add(TILES[1])
    path = pack(TILES[0])
    monkeypatch.setenv(FROZEN, "1")
    for name in ("ranked", "predicted_best", "recorded_choice"):
        monkeypatch.setattr(lookup_module, name, None)
    assert [choice.config for choice in candidates(GEMM, PROBLEM, DEVICE)] == [TILES[0]]
    assert choose(GEMM, PROBLEM, DEVICE, config=TILES[2]).config == TILES[2]
    other = replace(PROBLEM, activation="relu")
    with pytest.raises(NotPackedError) as caught:
        choose(GEMM, other, DEVICE)
    said = str(caught.value)
    assert said.startswith(f'{path} lacks gemm "{other}", and TILEWRIGHT_FROZEN is set: tune it (autotune --device rtx')
    assert f'--kernel gemm --problem "{other}"' in said
    assert GemmProblem.parse(str(other)) == other


def test_a_pack_that_cannot_serve_is_no_silent_one(pack):
    path = pack(TILES[0], device=A10)
    with pytest.raises(PackError, match="is of a10-72sm, and this GPU is rtx3090-82sm"):
        choose(GEMM, PROBLEM, DEVICE)
    pack(TILES[0], revision="0" * 64)
    with pytest.raises(PackError, match="is of another revision of gemm"):
        choose(GEMM, PROBLEM, DEVICE)
    for config, reason in ((GemmConfig(256, 256, 256), "does not fit"), ('{"BLOCK_M":16}', "is missing BLOCK_N")):
        path = pack(config)
        with pytest.raises(PackError, match=reason) as caught:
            choose(GEMM, PROBLEM, DEVICE)
        assert str(caught.value).startswith(f"{path}: ")
        assert str(caught.value).endswith("; make it again with `autotune pack`")
