"""The headline of an experiment, against figures worked out by hand."""

import pytest
from recorded import pruned, trained, tuned, write

from slimming.report.collect import collect
from slimming.report.headline import TOLERANCE, faster, fewer, headline
from slimming.report.outcomes import outcomes


def collection(folder, results):
    for name, result in results.items():
        write(folder, name, result)
    return outcomes(collect(folder).runs)


def cut(asked, params, macs, latency=5.0, **more):
    """A pruning of `sparse` (1000 parameters, 50,000 MACs, 10 ms), and its metrics replaced where given."""
    result = pruned("../sparse/last.ckpt", asked) | {"cost": {"num_params": params, "macs": macs}}
    result["latency_ms"]["after"] = latency
    return result | more


def fine(name, params, macs, accuracy, **more):
    return tuned(f"../{name}/pruned.ckpt", accuracy=accuracy) | {"cost": {"num_params": params, "macs": macs}} | more


RESULTS = {
    "sparse": trained("sparse", accuracy=0.800),
    "a": cut(0.3, 500, 30_000, 8.0),
    "fa": fine("a", 500, 30_000, 0.810),
    "b": cut(0.5, 250, 20_000, 4.0),
    "fb": fine("b", 250, 20_000, 0.796),
    "c": cut(0.7, 80, 6500, 2.0),
    "fc": fine("c", 80, 6500, 0.700),
}


def test_the_largest_reduction_within_half_a_point_of_the_sparse_network(tmp_path):
    sentence, explanation = headline(collection(tmp_path, RESULTS))
    assert sentence == "75% fewer parameters, 60% fewer MACs, 2.5 times as fast, accuracy 80.0% (sparse) -> 79.6%"
    assert explanation.startswith("Pruned, ratio 0.5: fine-tuned [lambda 0.0001, 3 epochs]; compared with: sparse.")
    assert "64 images per pass, cpu, 2 threads" in explanation and "(test accuracy)" in explanation


def test_the_baseline_of_the_same_training_is_what_pruning_is_compared_with(tmp_path):
    made = collection(tmp_path, RESULTS | {"baseline": trained("baseline", accuracy=0.815, sparsity=0.0)})
    assert headline(made)[0].endswith("40% fewer MACs, 1.2 times as fast, accuracy 81.5% (baseline) -> 81.0%")
    other = trained("baseline", accuracy=0.815, config={"sparsity": 0.0, "trainer": {"max_epochs": 300}})
    assert headline(collection(tmp_path, {"baseline": other}))[0].endswith("80.0% (sparse) -> 79.6%")


def test_the_most_accurate_where_all_lose_more(tmp_path):
    worse = {name: fine(name[1], 500, 30_000, acc) for name, acc in (("fa", 0.7), ("fb", 0.77), ("fc", 0.6))}
    assert headline(collection(tmp_path, RESULTS | worse))[0].endswith("80.0% (sparse) -> 77.0%")


def test_exactly_half_a_point_is_within(tmp_path):
    made = collection(tmp_path, RESULTS | {"fc": fine("c", 80, 6500, 0.8 - TOLERANCE)})
    assert headline(made)[0] == (
        "92% fewer parameters, 87% fewer MACs, 5.0 times as fast, accuracy 80.0% (sparse) -> 79.5%"
    )


def test_calibrated_where_nothing_was_fine_tuned_and_a_sparse_network_that_is_not_here(tmp_path):
    metrics = {"test/acc_before": 0.80, "test/acc_pruned": 0.1, "test/acc": 0.798}
    alone = {"b": cut(0.5, 250, 20_000, 20.0, metrics=metrics)}
    sentence, explanation = headline(collection(tmp_path, alone))
    assert sentence.endswith("60% fewer MACs, 2.0 times as slow, accuracy 80.0% (before pruning) -> 79.8%")
    assert ": calibrated" in explanation


def test_the_validation_split_decides_where_there_is_one(tmp_path):
    """By test accuracy `fb` would be shown; by validation accuracy it loses too much."""
    values = {"sparse": 0.80, "fa": 0.80, "fb": 0.70, "fc": 0.60}
    held = {n: RESULTS[n] | {"metrics": RESULTS[n]["metrics"] | {"val/acc": v}} for n, v in values.items()}
    sentence, explanation = headline(collection(tmp_path, RESULTS | held))
    assert sentence.endswith("40% fewer MACs, 1.2 times as fast, accuracy 80.0% (sparse) -> 81.0%")
    assert "(validation accuracy)" in explanation


def test_seeds_are_averaged(tmp_path):
    second = {
        "sparse2": trained("sparse", 2, 0.81),
        "b2": pruned("../sparse2/last.ckpt") | {"cost": {"num_params": 350, "macs": 10_000}},
        "fb2": tuned("../b2/pruned.ckpt", accuracy=0.83, seed=2) | {"cost": {"num_params": 350, "macs": 10_000}},
    }
    sentence, explanation = headline(collection(tmp_path, {k: RESULTS[k] for k in ("sparse", "b", "fb")} | second))
    # parameters (250 + 350) / 2, MACs (20,000 + 10,000) / 2, latency (4 + 5) / 2 of 10 ms, accuracy (79.6 + 83.0) / 2
    assert sentence == "70% fewer parameters, 70% fewer MACs, 2.2 times as fast, accuracy 80.5% (sparse) -> 81.3%"
    assert "n=2 -> n=2" in explanation


def test_the_speed_of_several_passes_is_their_product(tmp_path):
    again = trained("sparse", parent="../fb/last.ckpt", cost={"num_params": 250, "macs": 20_000})
    second = pruned("../again/last.ckpt", 0.5) | {"cost": {"num_params": 100, "macs": 5000}}  # 10 -> 5 ms
    chain = {"again": again, "p2": second, "f2": fine("p2", 100, 5000, 0.8)}
    made = collection(tmp_path, {k: RESULTS[k] for k in ("sparse", "b", "fb")} | chain)
    assert headline(made)[0].startswith("90% fewer parameters, 90% fewer MACs, 5.0 times as fast")


def test_no_headline_without_a_tested_pruning(tmp_path):
    assert headline(collection(tmp_path, {"sparse": RESULTS["sparse"]})) is None
    assert headline(collection(tmp_path, {"b": cut(0.5, 250, 20_000, metrics={})})) is None


@pytest.mark.parametrize(
    "share, text", [(0.48, "2.1 times as fast"), (1.0, "about as fast"), (1.2, "1.2 times as slow")]
)
def test_speeds(share, text):
    assert faster(share) == text


@pytest.mark.parametrize(
    "share, text", [(0.08, "92% fewer"), (0.004, "99.60% fewer"), (1.0, "0% fewer"), (1.02, "2% more")]
)
def test_reductions(share, text):
    assert fewer(share) == text
