"""The benchmark of several cards: its whole path on four devices, and how its results add up."""

from types import SimpleNamespace

from other_process import found_by

from benchmarks import kernel_events
from benchmarks.sharded_case import recipes
from benchmarks.sharded_profile import block_microseconds, kind_of, module_of, uncovered


def test_rows_of_several_runs_add_up_in_one_file(tmp_path):
    found = found_by("four_devices_bench.py", __file__, str(tmp_path / "sharded.json"))
    assert [run["commit"] for run in found["runs"]] == ["ep-tp-ragged-tp", "tp"]
    both, tensors = found["rows"]
    assert (both["recipe"], both["run"]) == ("ep-tp-ragged", 0)
    assert (tensors["recipe"], tensors["run"]) == ("tp", 1), "what is timed again takes the place of what was there"
    for row in found["rows"]:
        assert (row["model"], row["format"], row["M"], row["cards"]) == ("tiny", "int4", 8, 4)
        assert row["rel_l2"] < 1e-2
        assert min(row[name] for name in ("us", "one_card_us", "kernels_us", "between_us")) > 0
        assert abs(row["efficiency"] * 4 * row["us"] / row["one_card_us"] - 1) < 1e-3
        assert abs(row["outside_us"] + row["kernels_us"] - row["us"]) < 1e-3 * row["us"]
        assert row["imbalance"] >= 1


def test_one_card_times_the_first_of_many_ranks(tmp_path):
    found = found_by("four_devices_bench.py", __file__, str(tmp_path / "shares.json"), "--ranks", "4", "--cards", "1")
    assert [(row["recipe"], row["cards"]) for row in found["rows"]] == [("tp", 4)]
    (row,) = found["rows"]
    assert abs(row["kernels_efficiency"] * 4 * row["kernels_us"] / row["one_card_us"] - 1) < 1e-3
    assert "us" not in row


def test_recipes_follow_from_the_number_of_cards():
    sums, exchanges = ["ep", "tp", "ep-bf16", "tp-bf16", "ep-peer", "tp-peer"], ["ep-gather", "ep-ragged", "tp-gather"]
    assert [one.name for one in recipes(2)] == sums + exchanges
    assert [one.kind for one in recipes(2) if one.copies] == ["ep", "tp"]
    four = {one.name: (one.expert, one.tensor, one.kind, one.tokens) for one in recipes(4)}
    assert four["ep-tp"] == (2, 2, "ep-tp", ())
    assert four["ep-tp-ragged"] == (2, 2, "ep-tp", ("expert", "tensor"))
    assert four["ep-ragged"] == (4, 1, "ep", ("expert",))
    assert four["tp-gather"] == (1, 4, "tp", ("tensor",))


def test_kernels_are_told_apart_by_their_names():
    names = {
        "jmm_align_m64": "alignment",
        "jmm_combine_m16": "sums of slots",
        "jmm_gate_up_int4_m16": "products",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "collectives",
        "loop_convert_fusion": "xla",
    }
    assert {name: kind_of(name) for name in names} == names


def test_idle_time_is_what_no_kernel_covers():
    assert uncovered([(10, 20), (12, 15), (30, 40), (18, 25)]) == 5


def test_times_of_a_block_are_those_of_the_first_card_s_streams(tmp_path, monkeypatch):
    def event(name, start, duration, program="ep"):
        stats = [("hlo_module", module_of(program))]
        return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats)

    def plane(name, **lines):
        lines = [SimpleNamespace(name=line.replace("_", " "), events=events) for line, events in lines.items()]
        return SimpleNamespace(name=name, lines=lines)

    first = [event("jmm_gate_up", 0, 4000), event("jmm_down", 6000, 2000), event("jmm_down", 0, 9000, "another")]
    planes = [
        plane("/device:GPU:0", Stream_1=first, XLA_Ops=[event("jmm_down", 0, 50000)]),
        plane("/device:GPU:1", Stream_1=[event("jmm_down", 0, 50000)]),
        plane("/host:CPU", Stream_1=[event("jmm_down", 0, 50000)]),
    ]
    (tmp_path / "host.xplane.pb").touch()
    profile = SimpleNamespace(from_file=lambda _: SimpleNamespace(planes=planes))
    monkeypatch.setattr(kernel_events, "ProfileData", profile)
    assert block_microseconds(str(tmp_path), ["ep", "tp"], 2) == {"ep": {"products": 3.0, "idle": 1.0}}
    assert len(list(kernel_events.kernel_events(str(tmp_path)))) == 4
