"""Plans against a stand-in driver: what is packed where, what is lent, and what threads and streams share."""

from __future__ import annotations

import ctypes
import gc
import itertools
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tilewright.kernels import GemmConfig, GemmProblem, resolve_device, runtime
from tilewright.kernels.compile import Binary
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.runtime import GpuPlan, InterpretedPlan
from tilewright.tuning_db.errors import LaunchError, UnsupportedError
from tilewright.tuning_db.record import Resources

DEVICE = resolve_device("rtx3090")
PLAIN = GemmProblem(33, 48, 65)
FULL = GemmProblem(33, 48, 65, batch=2, bias="fp32", residual="fp16", alpha=True, strided=True)
TILE = GemmConfig(16, 16, 16)
BINARY = Binary(
    name="gemm_kernel",
    arch=86,
    cubin=b"a cubin",
    ptx="",
    num_warps=4,
    shared_bytes=1000,
    scratch_bytes=0,
    resources=Resources(registers=64, spill_bytes=0, stack_bytes=0, shared_bytes=1000),
)


class DriverError(RuntimeError):
    """`CUDADriverError`."""


class Driver:
    """`cupy_backends.cuda.api.driver` and the parts of `cupy` that go with it; keeps what it is told."""

    CUDADriverError = DriverError
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self):
        self.launches, self.attributes, self.modules, self.zeroed, self.waited = [], [], [], [], []
        self.slots = 0
        self.pause = lambda: None
        self.fail = None
        self.state = threading.local()
        self.addresses = itertools.count(0x1000, 0x1000)
        driver = self

        class Current:
            """`cupy.cuda.Device` or a stream, current while entered."""

            def __init__(self, name, value):
                self.name, self.value = name, value

            def __enter__(self):
                self.before = getattr(driver.state, self.name, 0)
                setattr(driver.state, self.name, self.value)

            def __exit__(self, *_):
                setattr(driver.state, self.name, self.before)

        class Stream(Current):
            """`cupy.cuda.Stream`, a new one."""

            def __init__(self, *, non_blocking):
                assert non_blocking, "it would wait for the legacy default stream, which a capture forbids"
                super().__init__("stream", next(driver.addresses))

            def __enter__(self):
                super().__enter__()
                return self

            def synchronize(self):
                driver.waited.append(self.value)

        class Module:
            """`cupy.cuda.Module`."""

            def load(self, cubin):
                driver.refuse("load")
                self.ptr = next(driver.addresses)
                driver.modules.append((cubin, driver.device()))

        def zeros(size, dtype):
            time.sleep(0.005)
            array = SimpleNamespace(size=size, data=SimpleNamespace(ptr=next(driver.addresses)))
            driver.zeroed.append((size, dtype, driver.device(), getattr(driver.state, "stream", 0)))
            return array

        self.cupy = SimpleNamespace(
            zeros=zeros,
            cuda=SimpleNamespace(
                Module=Module,
                Device=lambda ordinal: Current("device", ordinal),
                Stream=Stream,
                runtime=SimpleNamespace(getDevice=self.device),
            ),
        )

    def device(self):
        return getattr(self.state, "device", 0)

    def refuse(self, step):
        if self.fail == step:
            raise DriverError(f"CUDA_ERROR at {step}")

    def moduleGetFunction(self, module, name):  # noqa: N802 - CuPy's name
        self.refuse("function")
        return (module, name)

    def funcSetAttribute(self, function, attribute, value):  # noqa: N802
        self.refuse("attribute")
        self.attributes.append((attribute, value))

    def launchKernel(self, function, x, y, z, bx, by, bz, shared, stream, parameters, extra):  # noqa: N802
        self.refuse("launch")
        addresses = (ctypes.c_void_p * self.slots).from_address(parameters)
        first = [ctypes.c_uint64.from_address(address).value for address in addresses]
        self.pause()
        second = [ctypes.c_uint64.from_address(address).value for address in addresses]
        assert first == second, "another thread wrote into the parameters"
        assert extra == 0
        self.launches.append(
            SimpleNamespace(
                function=function[1],
                grid=(x, y, z),
                block=(bx, by, bz),
                shared=shared,
                stream=stream,
                values=first,
                device=self.device(),
            )
        )


@pytest.fixture
def driver(monkeypatch):
    fake = Driver()
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api", SimpleNamespace(driver=fake))
    monkeypatch.setattr(runtime, "require_cupy", lambda: fake.cupy)
    monkeypatch.setattr(runtime, "compile_launch", lambda launch, arch: BINARY)
    for kept in (runtime._scratch, runtime._retired, runtime._lasting):
        kept.clear()
    yield fake
    for kept in (runtime._scratch, runtime._retired, runtime._lasting):
        kept.clear()


def plan_of(driver, problem, config=TILE, ordinal=0):
    launches = GEMM.launches(problem, config)
    driver.slots = sum(argument.type is not None for argument in launches[0].arguments) + 2
    return GpuPlan(launches, DEVICE, ordinal)


def names(problem, config=TILE):
    return [argument.name for argument in GEMM.launches(problem, config)[0].arguments if argument.type is not None]


POINTERS = {
    name: 0xABC0_0000_0000 + index
    for index, name in enumerate(("a_ptr", "b_ptr", "bias_ptr", "residual_ptr", "alpha_ptr", "out_ptr"))
}
STRIDES = {
    name: 2**33 + index
    for index, name in enumerate(
        ("a_stride", "b_stride", "residual_stride", "a_batch_stride", "b_batch_stride", "residual_batch_stride",
         "out_stride", "out_batch_stride")
    )
}  # fmt: skip


def test_parameters_are_the_present_arguments_in_the_kernels_order_and_two_null_pointers(driver):
    plan_of(driver, FULL).run(POINTERS, STRIDES, 5)
    (launch,) = driver.launches
    values = dict(zip(names(FULL), launch.values[:-2], strict=True))
    assert list(values) == [
        *("a_ptr", "b_ptr", "bias_ptr", "residual_ptr", "alpha_ptr", "M", "N", "K"),
        *("a_stride", "b_stride", "residual_stride", "a_batch_stride", "b_batch_stride", "residual_batch_stride"),
        *("out_stride", "out_batch_stride", "out_ptr"),
    ]
    assert values == POINTERS | STRIDES | {"M": 33, "N": 48, "K": 65}
    assert launch.values[-2:] == [0, 0]


def test_absent_arguments_have_no_slot(driver):
    plan_of(driver, PLAIN).run(POINTERS, {}, 0)
    assert driver.launches[0].values == [POINTERS["a_ptr"], POINTERS["b_ptr"], 33, 48, 65, POINTERS["out_ptr"], 0, 0]


def test_grid_block_shared_memory_and_stream(driver):
    plan_of(driver, replace(PLAIN, batch=2), replace(TILE, num_warps=8)).run(POINTERS, {}, 77)
    (launch,) = driver.launches
    assert (launch.function, launch.grid, launch.block) == (
        "gemm_kernel",
        (3 * 3 * 2, 1, 1),
        (128, 1, 1),
    )  # as compiled
    assert (launch.shared, launch.stream) == (1000, 77)
    assert driver.modules == [(b"a cubin", 0)]


@pytest.mark.parametrize(("shared", "asked"), [(48 * 1024, []), (48 * 1024 + 1, [(8, 48 * 1024 + 1)])])
def test_more_than_48_kib_of_shared_memory_is_asked_for(driver, monkeypatch, shared, asked):
    monkeypatch.setattr(runtime, "compile_launch", lambda launch, arch: replace(BINARY, shared_bytes=shared))
    plan_of(driver, PLAIN).run(POINTERS, {}, 0)
    assert driver.attributes == asked
    assert driver.launches[0].shared == shared


def test_another_device_is_current_for_the_load_and_the_launch_alone(driver):
    plan = plan_of(driver, PLAIN, ordinal=1)
    assert driver.modules == [(b"a cubin", 1)]
    plan.run(POINTERS, {}, 0)
    assert driver.launches[0].device == 1
    assert driver.device() == 0


# Code


def test_code_is_loaded_once_for_all_plans_that_have_it(driver, monkeypatch):
    first = plan_of(driver, PLAIN)
    second = plan_of(driver, replace(PLAIN, M=1000))
    on_another = plan_of(driver, PLAIN, ordinal=1)
    assert driver.modules == [(b"a cubin", 0), (b"a cubin", 1)]
    first.run(POINTERS, {}, 0)
    second.run(POINTERS, {}, 0)
    assert [launch.grid for launch in driver.launches] == [(9, 1, 1), (189, 1, 1)]
    monkeypatch.setattr(runtime, "compile_launch", lambda launch, arch: replace(BINARY, cubin=b"other"))
    third = plan_of(driver, PLAIN)
    assert driver.modules[2:] == [(b"other", 0)]
    del first, second, third, on_another
    gc.collect()
    assert not runtime._code


def test_code_of_a_lasting_plan_stays_when_the_plan_is_gone(driver):
    plan = GpuPlan(GEMM.launches(PLAIN, TILE), DEVICE, 0, lasting=True)
    del plan
    gc.collect()
    plan_of(driver, PLAIN)
    assert driver.modules == [(b"a cubin", 0)]


# Scratch


def scratch_of(driver, launch, problem, config):
    values = dict(zip(names(problem, config), launch.values[:-2], strict=True))
    return values["workspace_ptr"], values["counters_ptr"]


def test_scratch_is_zeroed_once_and_lent_again(driver):
    config = replace(TILE, SPLIT_K=4)
    plan = plan_of(driver, PLAIN, config, ordinal=1)
    plan.run(POINTERS, {}, 77)
    plan.run(POINTERS, {}, 77)
    assert [each[:3] for each in driver.zeroed] == [(9 * 4 * 16 * 16, "float32", 1), (9, "int32", 1)]
    one, other = (scratch_of(driver, launch, PLAIN, config) for launch in driver.launches)
    assert one == other
    assert len(set(one)) == 2


def test_scratch_is_zero_before_it_is_lent_without_the_callers_stream(driver):
    """On the caller's stream a capture would take the zeroing into its graph."""
    plan_of(driver, PLAIN, replace(TILE, SPLIT_K=4)).run(POINTERS, {}, 77)
    streams = [stream for *_, stream in driver.zeroed]
    assert len(streams) == 2
    assert driver.waited == streams
    assert not {0, 77} & set(streams)


def test_streams_and_devices_never_share_scratch(driver):
    config = replace(TILE, SPLIT_K=4)
    plans = [plan_of(driver, PLAIN, config, ordinal) for ordinal in (0, 1)]
    for plan, stream in itertools.product(plans, (0, 77, 78)):
        plan.run(POINTERS, {}, stream)
    lent = [pointer for launch in driver.launches for pointer in scratch_of(driver, launch, PLAIN, config)]
    assert len(set(lent)) == 12


def test_the_per_thread_stream_is_another_one_in_every_thread(driver):
    config = replace(TILE, SPLIT_K=4)
    plan = plan_of(driver, PLAIN, config)
    for stream in (runtime.PER_THREAD_STREAM, 77):
        barrier = threading.Barrier(4)  # all alive at once: a thread's number is given to the next when it ends

        def run(stream=stream, barrier=barrier):
            barrier.wait()
            plan.run(POINTERS, {}, stream)
            barrier.wait()

        together(run, 4)
    counters = [scratch_of(driver, launch, PLAIN, config)[1] for launch in driver.launches]
    assert len(set(counters[:4])) == 4
    assert len(set(counters[4:])) == 1


def test_scratch_that_grows_keeps_the_old_one_alive(driver):
    config = replace(TILE, SPLIT_K=4)
    small, large = plan_of(driver, PLAIN, config), plan_of(driver, replace(PLAIN, M=330), config)
    for plan in (small, large, small):
        plan.run(POINTERS, {}, 77)
    sizes = [size for size, dtype, *_ in driver.zeroed if dtype == "int32"]
    assert sizes == [9, 63]
    # A captured graph may replay into the first: its memory must not go to anybody else.
    assert len(runtime._retired) == 2
    first, second, third = (scratch_of(driver, launch, PLAIN, config) for launch in driver.launches)
    assert first != second == third
    plan_of(driver, replace(PLAIN, M=340), config).run(POINTERS, {}, 77)
    assert [size for size, dtype, *_ in driver.zeroed if dtype == "int32"] == [9, 63, 126]  # at least twice as much


# Threads


def together(function, count):
    errors = []

    def guarded():
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def shared_plan_under_threads(driver, blocks=None):
    config = replace(TILE, SPLIT_K=2)
    run = plan_of(driver, PLAIN, config).bind(("a_ptr", "b_ptr", "out_ptr"), {})
    bound = run.__self__
    bound._blocks = bound._blocks if blocks is None else blocks(bound._blocks)
    driver.pause = lambda: time.sleep(0.0005)
    number = itertools.count(1)

    def work():
        mine = next(number) << 32
        for _ in range(20):
            run([mine, mine + 1, mine + 2], 77)

    together(work, 8)
    values = [dict(zip(names(PLAIN, config), launch.values, strict=False)) for launch in driver.launches]
    for each in values:
        assert each["b_ptr"] == each["a_ptr"] + 1
        assert each["out_ptr"] == each["a_ptr"] + 2
    return values


def test_threads_may_share_a_plan(driver):
    values = shared_plan_under_threads(driver)
    assert sorted({each["a_ptr"] >> 32 for each in values}) == list(range(1, 9))
    assert len(values) == 160
    # Made once, though all threads found it missing.
    assert len({each["counters_ptr"] for each in values}) == 1
    assert len(driver.zeroed) == 2


class OneForAll(list):
    """Blocks of which none is taken out."""

    def pop(self):
        return self[0]


def test_with_one_block_for_all_they_could_not(driver):
    with pytest.raises(AssertionError, match="another thread wrote into the parameters"):
        shared_plan_under_threads(driver, OneForAll)


def test_launches_one_after_the_other_share_a_block(driver):
    run = plan_of(driver, PLAIN).bind(("a_ptr", "b_ptr", "out_ptr"), {})
    for start in (0, 10):
        run([start, start + 1, start + 2], 0)
    assert [launch.values[:2] for launch in driver.launches] == [[0, 1], [10, 11]]
    assert len(run.__self__._blocks) == 1


def test_scratch_is_made_once_by_plans_that_race(driver):
    config = replace(TILE, SPLIT_K=2)
    plans = [plan_of(driver, replace(PLAIN, alpha=alpha), config) for alpha in (False, True)]
    driver.slots = 9
    plans = itertools.cycle(plans)
    barrier = threading.Barrier(8)
    takers = [next(plans) for _ in range(8)]

    def work():
        plan = takers.pop()
        barrier.wait()
        plan.run(POINTERS, {}, 77)

    together(work, 8)
    assert len(driver.zeroed) == 2


# Refusals


@pytest.mark.parametrize(
    ("resources", "limit"),
    [
        ({"shared_bytes": 101377}, "101377 B of shared memory are over the 101376 B of rtx3090"),
        ({"spill_bytes": 8}, "8 B a thread spill to local memory"),
        ({"registers": 255}, "255 registers × 16 warps are over the 65536 of an SM"),
    ],
)
def test_code_that_takes_more_than_the_device_has_is_never_loaded(driver, monkeypatch, resources, limit):
    greedy = replace(BINARY, num_warps=16, resources=replace(BINARY.resources, **resources))
    monkeypatch.setattr(runtime, "compile_launch", lambda launch, arch: greedy)
    with pytest.raises(UnsupportedError) as raised:
        plan_of(driver, PLAIN)
    assert str(raised.value) == f"this configuration can't run on rtx3090: {limit}"
    assert driver.modules == []


def test_code_that_needs_scratch_of_its_own_is_lent_it_for_every_block(driver, monkeypatch):
    monkeypatch.setattr(runtime, "compile_launch", lambda launch, arch: replace(BINARY, scratch_bytes=128))
    plan_of(driver, PLAIN).run(POINTERS, {}, 77)
    assert [each[:3] for each in driver.zeroed] == [(9 * 128, "int8", 0)]
    global_scratch, profile_scratch = driver.launches[0].values[-2:]
    assert global_scratch not in (0, None)
    assert not profile_scratch


@pytest.mark.parametrize(("limit", "blocks"), [(0, 9), (1, 2), (4, 8), (5, 9)])
def test_a_grid_may_be_limited_by_the_sms_of_the_device(driver, monkeypatch, limit, blocks):
    launches = tuple(replace(launch, blocks_per_sm=limit) for launch in GEMM.launches(PLAIN, TILE))
    monkeypatch.setattr(runtime, "compile_launch", lambda launch, arch: BINARY)
    runtime.GpuPlan(launches, replace(resolve_device("rtx3090"), sms=2), 0).run(POINTERS, {}, 0)
    assert driver.launches[0].grid == (blocks, 1, 1)


@pytest.mark.parametrize("step", ["load", "function", "attribute"])
def test_a_driver_that_refuses_the_code_is_named(driver, monkeypatch, step):
    monkeypatch.setattr(runtime, "compile_launch", lambda launch, arch: replace(BINARY, shared_bytes=65536))
    driver.fail = step
    with pytest.raises(LaunchError, match=rf"^the driver refused gemm_kernel for sm_86: CUDA_ERROR at {step}$"):
        plan_of(driver, PLAIN)


def test_a_launch_that_fails_is_named_and_the_plan_is_not_left_locked(driver):
    plan = plan_of(driver, PLAIN)
    driver.fail = "launch"
    with pytest.raises(LaunchError, match=r"^launch of 9×1×1 blocks of 128 threads failed: CUDA_ERROR at launch$"):
        plan.run(POINTERS, {}, 0)
    driver.fail = None
    plan.run(POINTERS, {}, 0)
    assert len(driver.launches) == 1


def test_a_plan_without_a_pointer_it_needs_fails_before_the_launch(driver):
    with pytest.raises(KeyError, match="out_ptr"):
        plan_of(driver, PLAIN).run({"a_ptr": 1, "b_ptr": 2}, {}, 0)
    assert driver.launches == []


@pytest.mark.parametrize(
    ("name", "value", "kind"), [("M", 2**31, "i32"), ("N", -(2**31) - 1, "i32"), ("a_stride", 2**63, "i64")]
)
def test_a_number_that_its_type_does_not_hold_fails_before_the_launch(driver, name, value, kind):
    """The driver would pass on the bits that there is room for; the interpreter would take a wider type."""
    (launch,) = GEMM.launches(FULL, TILE)
    driver.slots = sum(argument.type is not None for argument in launch.arguments) + 2

    def run(number):
        arguments = tuple(
            argument._replace(value=number) if argument.name == name and argument.value is not None else argument
            for argument in launch.arguments
        )
        changed, strides = replace(launch, arguments=arguments), STRIDES | {name: number}
        for plan in (GpuPlan((changed,), DEVICE, 0), InterpretedPlan((replace(changed, grid=(0, 1, 1)),))):
            pointers = POINTERS if isinstance(plan, GpuPlan) else dict.fromkeys(POINTERS, np.zeros(1, np.float16))
            yield lambda plan=plan, pointers=pointers: plan.run(pointers, strides, 0)

    for attempt in run(value):
        with pytest.raises(UnsupportedError, match=rf"^{name}={value} does not fit in {kind}$"):
            attempt()
    assert driver.launches == []
    for attempt in run(value - 1 if value > 0 else value + 1):
        attempt()
    assert len(driver.launches) == 1


# The interpreter


def test_an_interpreted_plan_runs_on_arrays_and_lends_zeroed_scratch():
    problem, config = GemmProblem(5, 7, 40, dtype="fp32"), GemmConfig(16, 16, 16, SPLIT_K=2)
    plan = InterpretedPlan(GEMM.launches(problem, config))
    arrays = problem.inputs(0)
    for _ in range(2):
        out = np.full((1, 5, 7), np.nan, np.float32)
        plan.run({"a_ptr": arrays["a"], "b_ptr": arrays["b"], "out_ptr": out}, {}, 0)
        np.testing.assert_allclose(out, GEMM.reference(problem, arrays)["out"], atol=1e-5)


def test_launches_of_one_plan_follow_each_other_whoever_else_is_there(driver, monkeypatch):
    """What the first leaves in scratch memory the second reads: another thread's may not come between."""
    order = []

    class Slow:
        def __init__(self, name):
            self.name = name

        def bind(self, names, strides):
            return self.launch

        def launch(self, addresses, stream):
            order.append((threading.get_ident(), self.name))
            time.sleep(0.01)

    plans = [plan_of(driver, PLAIN) for _ in range(2)]
    for plan in plans:
        plan._loaded = [Slow("forward"), Slow("combine")]
    threads = [threading.Thread(target=plan.run, args=({}, {}, 0)) for plan in plans * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [name for _, name in order] == ["forward", "combine"] * 4
    assert all(first[0] == second[0] for first, second in zip(order[::2], order[1::2], strict=True))


def test_given_code_is_loaded_and_nothing_compiled(driver, monkeypatch):
    monkeypatch.setattr(runtime, "compile_launch", None)
    launches = GEMM.launches(PLAIN, TILE)
    given = replace(BINARY, cubin=b"given")
    GpuPlan(launches, DEVICE, 0, (given,))
    assert driver.modules == [(b"given", 0)]
    with pytest.raises(UnsupportedError, match="8 B a thread spill"):
        GpuPlan(launches, DEVICE, 0, (replace(given, resources=replace(BINARY.resources, spill_bytes=8)),))
