from dataclasses import replace

import pytest

from megatron_m1.config import ConfigError
from megatron_m1.engine.cluster import DEVICES, Cluster
from megatron_m1.engine.rates import Rates, read_rates

# Links of 1 GB/s after the shares of cluster.py: 0.8 of 1.25.
CLUSTER = Cluster(
    gpus=16, gpus_per_node=4, memory_gib=80, memory_tb_per_s=4.8, nvlink_gb_per_s=1.25, network_gb_per_s=0.125,
    rates=Rates(copy_share=4.3 / 4.8, nvlink_share=0.8, network_share=0.8, grouped_tflops=600, grouped_small_tflops=410),
)  # fmt: skip


def test_an_exchange_uses_both_links_at_once():
    assert CLUSTER.bytes_per_s == pytest.approx(4.3e12)
    assert CLUSTER.exchange_s(1e9, peers=1, stride=1) == 0
    assert CLUSTER.exchange_s(1e9, peers=4, stride=1) == pytest.approx(1.0)
    # Of 7 peers 3 are near and 4 far: 4/7 GB over 0.1 GB/s against 3/7 over 1 GB/s.
    assert CLUSTER.exchange_s(1e9, peers=8, stride=1) == pytest.approx(4 / 7 * 10)
    # Every fourth rank: all peers are far.
    assert CLUSTER.exchange_s(1e9, peers=4, stride=4) == pytest.approx(10.0)


def test_a_collective_is_as_fast_as_its_slowest_link():
    assert CLUSTER.collective_s(1e9, peers=1, stride=8) == 0
    assert CLUSTER.collective_s(1e9, peers=2, stride=2) == pytest.approx(1.0)
    assert CLUSTER.collective_s(1e9, peers=8, stride=1) == pytest.approx(10.0)


@pytest.mark.parametrize("rows, tflops", [(128, 205), (256, 410), (640, 505), (1024, 600), (9999, 600)])
def test_rate_of_the_experts_grows_with_their_tokens(rows, tflops):
    assert CLUSTER.grouped_tflops(rows) == pytest.approx(tflops)


def test_known_devices_and_bad_numbers():
    assert DEVICES["H800"].nvlink_gb_per_s == 200 < DEVICES["H200"].nvlink_gb_per_s
    for name, value in (("gpus", 0), ("memory_gib", float("inf")), ("network_gb_per_s", float("nan"))):
        with pytest.raises(ConfigError, match=f"{name}={value} of a cluster must be above 0, and finite"):
            replace(DEVICES["H800"], **{name: value})


def test_rates_from_a_file(tmp_path):
    file = tmp_path / "rates.json"
    file.write_text('{"dense_tflops": 350, "calibration": "by hand"}')
    rates = read_rates(file)
    assert (rates.dense_tflops, rates.grouped_tflops, rates.calibration) == (350, Rates().grouped_tflops, "by hand")
    for text, message in (
        ('{"dense": 1}', "holds dense; it may hold dense_tflops, "),
        ('{"dense_tflops": 0}', "dense_tflops=0 of the rates must be a finite number above 0"),
        ('{"dense_tflops": true}', "dense_tflops=True of the rates"),
        ('{"dense_tflops": Infinity}', "dense_tflops=inf of the rates"),
        ('{"dense_tflops": NaN}', "dense_tflops=nan of the rates"),
        ('{"dense_tflops": "700"}', "dense_tflops='700' of the rates"),
        ('{"layer_host_s": -1}', "layer_host_s=-1 of the rates must be a finite number of at least 0"),
        ('{"calibration": 3}', "calibration=3 of the rates must be text"),
        ("[]", "holds .no mapping."),
        ("{", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_rates(file)
