"""The model of a network against small cases computed by hand, and the simulation against closed forms."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_msn.cli.main import main
from hf_msn.distributed.planner import Network, plan_sync, simulate_async_gossip

# 1 MB of parameters over 1 MB/s: 1 s for a message, 1 s for an all-reduce of two ranks
TWO = {"parameters": "250K", "ranks": 2, "bandwidth": "8mbit", "latency": "0ms", "efficiency": 1.0}


def seconds(**settings):
    return {row["method"]: row["seconds_per_step"] for row in plan_sync(**{**TWO, **settings})}


@pytest.mark.parametrize("step", [0.5, 2.0])
def test_two_equal_ranks_follow_closed_forms(step):
    found = seconds(step_seconds=step, ddp_overlap=0.6)
    assert found["DDP"] == pytest.approx(step + max(1.0 - 0.6 * step, 0.0))
    assert found["LocalSGD (12)"] == found["SlowMo (12)"] == pytest.approx(step + 1 / 12)
    assert found["NoLoCo (50)"] == pytest.approx(step + 1 / 50)
    assert found["Gossip, exponential"] == found["Gossip, ring"] == pytest.approx(step + 1.0)
    # 120 steps, of which each but the first waits for the message that was sent a step before
    assert found["OverlapGossip, ring"] == pytest.approx((step + 119 * max(step, 1.0)) / 120)
    assert found["AsyncGossip, AD-PSGD"] == found["AsyncGossip, push-sum"] == pytest.approx(step)
    assert found["StreamingDiLoCo (100)"] == pytest.approx(step)  # a fragment takes 1/4 s, and has 5 steps for it
    assert found["Codistillation (2500)"] == pytest.approx(step * 4 / 3)  # a forward pass of one copy


def test_a_streamed_fragment_is_waited_for_at_the_step_at_which_it_is_due():
    # 5 s for a fragment, of which 5 steps of 0.5 s hide half. 8 are sent in 200 steps, the last is not due in them.
    found = seconds(step_seconds=0.5, bandwidth="0.4mbit")
    assert found["StreamingDiLoCo (100)"] == pytest.approx((200 * 0.5 + 7 * 2.5) / 200)
    # At 25 s each of them, one after the other: they are sent at 12.5 s and when the one before is there.
    found = seconds(step_seconds=0.5, bandwidth="0.08mbit")
    now, free = 0.0, 0.0
    due = {}
    for step in range(1, 201):
        now = max(now + 0.5, due.get(step, 0.0))
        if step % 25 == 0:
            free = due[step + 5] = max(now, free) + 25.0
    assert found["StreamingDiLoCo (100)"] == pytest.approx(now / 200)


def test_codistillation_waits_for_what_a_tenth_of_its_period_does_not_hide():
    # 3 messages of 100 s enter each link; 250 steps of 2 * 0.1 s hide 50 of their 300 s
    found = seconds(step_seconds=0.1, ranks=4, bandwidth="0.08mbit")
    assert found["Codistillation (2500)"] == pytest.approx(0.2 + 250.0 / 2500)


@pytest.mark.parametrize(("message", "expected"), [(0.01, 0.5), (1.0, 0.25), (0.9, 0.25)])
def test_ad_psgd_of_two_ranks_sends_a_question_and_an_answer_per_round(message, expected):
    """Question and answer each wait for the end of a step: with messages of 1 s, 4 steps of half a second in all."""
    network = Network(ranks=2, ranks_per_node=1, bandwidth=1.0, latency=0.0, node_bandwidth=1.0)
    step, sent, most = simulate_async_gossip("ad_psgd", network, message, lambda: 0.5, 200)
    assert step == pytest.approx(0.5) and sent == pytest.approx(expected, rel=0.02) and most == 1


@pytest.mark.parametrize("steps_of_message", [1, 2, 5])
def test_push_sum_adds_up_what_waits_and_sends_from_half_a_weight_on(steps_of_message):
    weight, waiting, on_the_way, sent = 1.0, 0.0, {}, 0  # of either of two ranks, which do the same
    for step in range(100):
        if step in on_the_way:
            arrived = on_the_way.pop(step)
            if waiting:
                on_the_way[step + steps_of_message], waiting, sent = waiting, 0.0, sent + (step < 99)
            weight += arrived
        if weight >= 0.5:
            weight /= 2
            if on_the_way:
                waiting += weight
            else:
                on_the_way[step + steps_of_message], sent = weight, sent + 1
        assert weight + waiting + sum(on_the_way.values()) == pytest.approx(1.0)
    network = Network(ranks=2, ranks_per_node=1, bandwidth=1.0, latency=0.0, node_bandwidth=1.0)
    found = simulate_async_gossip("push_sum", network, 0.5 * steps_of_message, lambda: 0.5, 100)[1]
    assert found == pytest.approx(sent / 100, abs=0.011)


def test_messages_that_share_a_link_come_one_after_the_other():
    """Two ranks ask the one neighbour of both: question 1 s, question 2 s, answers 3 s and 4 s later at the latest."""
    settings = {"bandwidth": 1.0, "latency": 0.0, "node_bandwidth": 100.0}
    alone = simulate_async_gossip("ad_psgd", Network(2, 1, **settings), 1.0, lambda: 0.125, 800)[1]
    shared = simulate_async_gossip("ad_psgd", Network(3, 1, **settings), 1.0, lambda: 0.125, 800)[1]
    near = simulate_async_gossip("ad_psgd", Network(2, 2, **settings), 1.0, lambda: 0.125, 800)[1]
    # a link that is always busy carries 1 message per second and direction: 2 per second for three ranks
    assert shared == pytest.approx(2 * 0.125 / 3, rel=0.05)
    assert alone == pytest.approx(0.125 / 2, rel=0.05) and near == pytest.approx(0.5, rel=0.05)


def test_latency_and_precision_enter_as_they_should():
    found = seconds(step_seconds=0.5, latency="200ms", bytes_per_parameter=2, ddp_overlap=0.0)
    assert found["DDP"] == pytest.approx(0.5 + 0.5 + 2 * 0.2)
    assert found["Gossip, ring"] == pytest.approx(0.5 + 0.5 + 0.2)


def test_the_bytes_are_those_that_the_classes_count():
    rows = {row["method"]: row for row in plan_sync(**{**TWO, "ranks": 4, "step_seconds": 0.5})}
    assert rows["DDP"]["megabytes_per_step"] == pytest.approx(2 * 3 / 4)
    assert rows["SlowMo (12)"]["megabytes_per_step"] == pytest.approx(2 * 3 / 4 / 12)
    assert rows["SlowMo (12)"]["megabytes_peak"] == pytest.approx(2 * 3 / 4)
    assert rows["NoLoCo (50)"]["megabytes_per_step"] == pytest.approx(1 / 50)
    assert rows["Gossip, ring"]["megabytes_per_step"] == pytest.approx(2.0)
    assert rows["StreamingDiLoCo (100)"]["megabytes_peak"] == pytest.approx(2 * 3 / 4 / 4)
    assert rows["StreamingDiLoCo (100)"]["megabytes_per_step"] == pytest.approx(2 * 3 / 4 / 100)
    # one message there and one back take 4 steps of half a second, and more where two ranks ask the same one
    assert 0.15 < rows["AsyncGossip, AD-PSGD"]["megabytes_per_step"] < 0.25
    assert rows["Codistillation (2500)"]["megabytes_peak"] == pytest.approx(3.0)
    assert all(row["times_ddp"] == rows["DDP"]["seconds_per_step"] / row["seconds_per_step"] for row in rows.values())


def test_the_ranks_of_a_node_share_its_link():
    network = Network(ranks=4, ranks_per_node=2, bandwidth=1.0, latency=0.5, node_bandwidth=10.0)
    # inside: 2 * 1/2 * 8 / 10; between two nodes: 2 * 1/2 * 8 / 1 + 2 * 0.5
    assert network.all_reduce_seconds(8.0) == pytest.approx(0.8 + 8.0 + 1.0)
    # next rank: one message crosses each link; rank + 2: two do
    assert network.message_seconds([[3], [0], [1], [2]], 8.0) == pytest.approx([8.5, 0.8, 8.5, 0.8])
    assert network.message_seconds([[2], [3], [0], [1]], 8.0) == pytest.approx([16.5] * 4)
    # two ranks send to two others each over a link
    assert network.all_to_all_seconds(8.0) == pytest.approx(32.5)
    assert network.message_seconds([[], [2], [], []], 8.0) == pytest.approx([0.0, 8.5, 0.0, 0.0])
    # one node receives two messages over its link, the other sends them
    assert network.message_seconds([[2, 3], [], [], []], 8.0) == pytest.approx([16.5, 0.0, 0.0, 0.0])


def test_stragglers_cost_those_that_wait_for_more_ranks_more():
    settings = {"ranks": 32, "bandwidth": "800gbit", "step_seconds": 1.0, "stragglers": 0.5}
    found = seconds(**settings)
    assert found == seconds(**settings)
    assert found != seconds(**settings, seed=1)
    mean = 2.718281828 ** (0.5**2 / 2)  # of exp(0.5 z)
    assert found["AsyncGossip, AD-PSGD"] == pytest.approx(mean, rel=0.03)
    assert found["AsyncGossip, push-sum"] == pytest.approx(mean, rel=0.03)
    # the greatest of 32 standard normal numbers is about 2.07 on average
    assert 2.5 < found["DDP"] < 3.5
    assert mean < found["NoLoCo (50)"] < found["LocalSGD (12)"] < found["Gossip, ring"] < found["DDP"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parameters", "86X"),
        ("parameters", "0"),
        ("parameters", "-5M"),
        ("bandwidth", "1"),
        ("bandwidth", "0gbit"),
        ("bandwidth", "1GB"),
        ("latency", "20"),
        ("ranks", 1),
        ("ranks_per_node", 3),
        ("step_seconds", 0.0),
        ("stragglers", -0.1),
        ("bytes_per_parameter", 0),
        ("efficiency", 1.5),
        ("ddp_overlap", -1.0),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*{value}"):
        seconds(**{"step_seconds": 0.5, name: value})


def test_units_do_not_depend_on_case_or_space():
    same = {"parameters": "0.25m", "bandwidth": "8000 KBIT", "latency": "0us"}
    assert seconds(step_seconds=0.5, **same) == seconds(step_seconds=0.5)


def test_the_command_prints_every_method_fastest_first_and_writes_its_files(tmp_path, capsys):
    line = "plan-sync --parameters 1M --ranks 4 --ranks-per-node 2 --bandwidth 1Gbit --step_seconds 0.1"
    main([*line.split(), "--json", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "plan.png")])
    rows = json.loads((tmp_path / "plan.json").read_text())
    shown = [float(text.split()[-4]) for text in capsys.readouterr().out.splitlines()[1:]]
    assert shown == sorted(shown) and len(shown) == len(rows)
    assert rows[0]["method"] == "DDP" and rows[0]["times_ddp"] == 1.0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_counts_the_numbers_of_a_model(tmp_path):
    rows = {"weight": torch.zeros(300, 100), "bias": torch.zeros(300), "count": torch.zeros(())}
    save_file(rows, tmp_path / "model.safetensors")
    line = f"plan-sync --ranks 2 --bandwidth 1Gbit --step_seconds 0.1 --json {tmp_path}/plan.json".split()
    main([*line, "--model", str(tmp_path)])
    assert json.loads((tmp_path / "plan.json").read_text())[0]["megabytes_peak"] == pytest.approx(30301 * 4 / 1e6)
    for wrong, name in (
        ([], "`model`"),
        (["--model", str(tmp_path), "--parameters", "1M"], "1M"),
        (["--model", "/no/such"], "`model`.*/no/such"),
    ):
        with pytest.raises(ValueError, match=name):
            main([*line, *wrong])
    assert list(tmp_path.glob("*.png")) == []
    for plot, name in ((tmp_path, "`plot`"), (tmp_path / "plan.json", "`json`.*`plot`")):
        with pytest.raises(ValueError, match=name):
            main([*line, "--model", str(tmp_path), "--plot", str(plot)])
    with pytest.raises(ValueError, match="`bandwidth`"):
        main("plan-sync --parameters 1M --ranks 4 --step_seconds 0.1".split())
