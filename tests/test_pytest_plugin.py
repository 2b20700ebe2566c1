"""The pytest plugin: costs nothing until it is used, records, and holds tests to their baselines."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

SUITE = """
    import pytest
    import torch
    from torch import nn

    @pytest.fixture
    def net():
        net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Dropout(), nn.ReLU())
        net[0].weight.data.fill_(1.0)
        net[0].bias.data = torch.tensor([1.0, SHIFT])
        return net

    @pytest.mark.parametrize("size", [2, 3])
    def test_sizes(net, activations, activation_regression, size):
        activation_regression.check(activations(net, torch.ones(1, 1, size, size), ["0", "2"]))

    class TestInClass:
        @pytest.mark.parametrize("what", ["a/b", "a_b"])
        def test_names(self, net, activations, activation_regression, what):
            acts = activations(net, torch.ones(1, 1, 2, 2), "2")
            activation_regression.check(acts)
            activation_regression.check(acts["2"], name=f"more of {what}")
"""


def write(pytester: pytest.Pytester, shift: float) -> None:
    pytester.makepyfile(test_net=SUITE.replace("SHIFT", str(shift)))


def test_baselines_are_written_and_held_to(pytester):
    write(pytester, 2.0)
    missing = pytester.runpytest_inprocess()
    missing.assert_outcomes(failed=4)
    missing.stdout.fnmatch_lines(
        ["*no baseline 'test_net/test_sizes-2.json'; run `pytest --activations-overwrite` to write it, *"]
    )
    assert not (pytester.path / "test_net").exists()

    pytester.runpytest_inprocess("--activations-overwrite").assert_outcomes(passed=4)
    folder = pytester.path / "test_net"
    names = sorted(path.name for path in folder.iterdir())
    assert names[-2:] == ["test_sizes-2.json", "test_sizes-3.json"]
    assert "TestInClass.test_names-a_b.json" in names
    assert len(names) == 6
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    pytester.runpytest_inprocess().assert_outcomes(passed=4)
    write(pytester, 2.5)
    changed = pytester.runpytest_inprocess()
    changed.assert_outcomes(failed=4)
    changed.stdout.fnmatch_lines(
        [
            "*6 differences from the baseline 'test_net/test_sizes-2.json'",
            "*0: mean: 1 of 2 channels (50.0%) differs by more than 1e-05 + 0.001 [*] abs(expected)",
            "*  worst: 3.5 where 3 was expected, at channel 1; the difference is 0.5, or 16.7% of *",
            "*where this is meant, run `pytest --activations-overwrite` to renew it",
        ]
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    pytester.runpytest_inprocess("--activations-overwrite").assert_outcomes(passed=4)
    assert {path.name for path in folder.iterdir()} == before.keys()
    assert b"3.5" in (folder / "test_sizes-2.json").read_bytes()


@pytest.mark.slow
def test_baselines_are_the_same_under_xdist(pytester):
    write(pytester, 2.0)
    pytester.runpytest_subprocess("--activations-overwrite", "-n2").assert_outcomes(passed=4)
    assert len(list((pytester.path / "test_net").iterdir())) == 6
    write(pytester, 2.5)
    changed = pytester.runpytest_subprocess("-n2")
    changed.assert_outcomes(failed=4)
    changed.stdout.fnmatch_lines(["*6 differences from the baseline 'test_net/test_sizes-2.json'"])


def test_the_plugin_loads_no_torch_until_it_is_used(pytester):
    pytester.makepyfile(
        """
        import sys

        def test_light(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("torchlens_viz")
            assert not {"torch", "numpy", "PIL", "torchvision"} & set(sys.modules)

        def test_heavy(activations):
            assert "torch" in sys.modules and "torchvision" not in sys.modules
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)


def test_the_plugin_module_itself_is_light():
    code = "import sys, torchlens_viz.pytest_plugin; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_activations_runs_in_eval_mode_and_leaves_the_model_as_it_was(activations):
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5))
    net[2].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    x = torch.ones(3, 1, 2, 2)
    acts = activations(net, x, "*", channels=[1])
    assert torch.equal(acts["2"], acts["1"])
    assert torch.equal(acts["0"], net[0](x)[:, [1]])
    assert not acts["0"].requires_grad
    assert [module.training for module in net] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not net[0]._forward_hooks


def test_activations_spreads_tuples_and_dicts(activations):
    net = nn.Bilinear(2, 3, 4)
    one, two = torch.ones(1, 2), torch.ones(1, 3)
    expected = net(one, two)
    assert torch.equal(activations(net, (one, two), "")[""], expected)
    assert torch.equal(activations(net, {"input1": one, "input2": two}, "")[""], expected)
