"""Settings and the flags made from them; the memory budget."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from runtime.core import SamplingParams
from runtime.errors import InvalidRequest, InvalidSetting
from runtime.machine.available_memory import available_memory
from runtime.machine.memory import default_budget, plan_slots
from runtime.machine.sizes import format_bytes, kv_bytes_per_token
from runtime.settings import EngineSettings, add_flags, from_namespace, parse_bytes, setting


def parse(cls: type[Any], *argv: str, **options: Any) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, cls, **options)
    return from_namespace(cls, parser.parse_args(argv))


@pytest.mark.parametrize("cls", [EngineSettings, SamplingParams])
def test_no_flags_give_the_defaults_and_every_field_has_help(cls: type[Any]) -> None:
    assert parse(cls) == cls()
    assert all(item.metadata["help"] for item in fields(cls))


def test_flags_are_read_by_type() -> None:
    engine = parse(EngineSettings, "--max-batch", "8", "--kv-memory", "4GiB", "--threads", "2")
    assert engine == EngineSettings(max_batch=8, kv_memory=4 * 2**30, threads=2)
    params = parse(
        SamplingParams,
        *("--temperature", "0.5", "--stop", "a", "--stop", "b", "--stop-token-ids", "7", "--seed", "-3"),
        *("--logit-bias", "5=-1.5", "--logit-bias", "6=2", "--ignore-eos", "--logprobs", "0"),
    )
    assert params == SamplingParams(
        temperature=0.5,
        stop=("a", "b"),
        stop_token_ids=frozenset({7}),
        seed=-3,
        logit_bias={5: -1.5, 6: 2.0},
        ignore_eos=True,
        logprobs=0,
    )


def test_flags_can_be_left_out_and_defaults_replaced() -> None:
    @dataclass(frozen=True)
    class Two:
        one: int = setting(1, "first")
        is_on: bool = setting(True, "second")
        rate: float | None = setting(None, "third")

    assert parse(Two, "--no-is-on", "--rate", "0.5") == Two(1, False, 0.5)
    assert parse(Two, defaults={"one": 5}) == Two(5)
    with pytest.raises(SystemExit):
        parse(Two, "--one", "2", skip=("one",))


@pytest.mark.parametrize(
    "argv",
    [
        ("--max-batch", "0"),
        ("--max-waiting", "-1"),
        ("--prefill-chunk", "0"),
        ("--threads", "0"),
        ("--max-len", "1"),
        ("--kv-memory", "0"),
    ],
)
def test_values_out_of_range_are_refused_by_flag_name(argv: tuple[str, str]) -> None:
    with pytest.raises(InvalidSetting, match=f"{argv[0]} must be at least .*, got {argv[1]}"):
        parse(EngineSettings, *argv)


@pytest.mark.parametrize(
    "argv",
    [("--max-batch", "many"), ("--kv-memory", "4 apples"), ("--kv-memory", "4I"), ("--kv-memory", "-1G")],
)
def test_malformed_values_never_become_the_default(argv: tuple[str, str]) -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parse(EngineSettings, *argv)
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parse(SamplingParams, "--logit-bias", "5:1")
    with pytest.raises(InvalidRequest, match="temperature"):
        parse(SamplingParams, "--temperature", "3")


@pytest.mark.parametrize(
    ("text", "count"),
    [("12", 12), ("500MB", 500 * 10**6), ("4G", 4 * 10**9), ("1.5GiB", 3 * 2**29), ("2 kb", 2000), ("7B", 7)],
)
def test_sizes_are_read_in_both_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def test_sizes_are_written_for_people() -> None:
    assert [format_bytes(n) for n in (11_324_620_800, 2048, 5)] == ["11.3 GB", "2.0 kB", "5 bytes"]


SMOLLM2 = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64}


def test_slots_fill_the_budget_up_to_the_batch() -> None:
    per_token = kv_bytes_per_token(**SMOLLM2, dtype="float32")
    assert per_token == 2 * 30 * 3 * 64 * 4
    assert kv_bytes_per_token(**SMOLLM2, dtype="float16") * 2 == per_token
    slot = 8192 * per_token
    assert plan_slots(max_batch=32, capacity=8192, bytes_per_token=per_token, budget=100 * slot) == 32
    assert plan_slots(max_batch=32, capacity=8192, bytes_per_token=per_token, budget=3 * slot + 1) == 3


def test_a_budget_below_one_slot_is_refused_with_the_sums() -> None:
    with pytest.raises(InvalidSetting) as caught:
        plan_slots(max_batch=4, capacity=1000, bytes_per_token=50, budget=20_000)
    assert str(caught.value) == (
        "one KV slot of 1,000 tokens takes 50.0 kB (50 bytes a token) and only 20.0 kB may be used; "
        "set --max-len 400 or less, or a larger --kv-memory"
    )
    with pytest.raises(InvalidSetting, match="'float8'"):
        kv_bytes_per_token(**SMOLLM2, dtype="float8")


def write(root: Path, name: str, text: str) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_free_memory_is_the_kernels_or_the_control_groups_if_that_is_less(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="--kv-memory"):
        available_memory(tmp_path)
    write(tmp_path, "proc/meminfo", "MemTotal: 9000 kB\n")
    with pytest.raises(InvalidSetting, match="MemAvailable"):
        available_memory(tmp_path)
    write(tmp_path, "proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert available_memory(tmp_path) == 4_096_000
    assert default_budget(weight_bytes=96_000, root=tmp_path) == 2_400_000
    assert default_budget(weight_bytes=10**9, root=tmp_path) == 0
    write(tmp_path, "proc/self/cgroup", "0::/pod/app\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/memory.current", "10\n")
    assert available_memory(tmp_path) == 4_096_000
    write(tmp_path, "sys/fs/cgroup/pod/memory.max", "3000000\n")
    write(tmp_path, "sys/fs/cgroup/pod/memory.current", "2000000\n")
    assert available_memory(tmp_path) == 1_000_000
    write(tmp_path, "sys/fs/cgroup/pod/memory.stat", "anon 5\ninactive_file 500000\n")
    assert available_memory(tmp_path) == 1_500_000


def test_the_older_control_groups_count_too(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemAvailable: 4000 kB\n")
    write(tmp_path, "proc/self/cgroup", "5:memory:/box\n3:cpu:/box\n")
    write(tmp_path, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", "2000000\n")
    write(tmp_path, "sys/fs/cgroup/memory/box/memory.usage_in_bytes", "500000\n")
    assert available_memory(tmp_path) == 1_500_000


def test_this_machine_has_free_memory() -> None:
    assert available_memory() > 2**20
