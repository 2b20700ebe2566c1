"""What other threads do, such as compiling, costs a capture nothing."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from tests.nets import hook_count
from torchlens_viz import capture, survey

BATCHES = [torch.rand(4, 3, 6, 6) for _ in range(5)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()


@pytest.fixture
def while_compiling():
    """Hold another thread in the middle of compiling a model of its own, for as long as the test runs."""
    torch._dynamo.reset()
    is_compiling, may_end = threading.Event(), threading.Event()

    def backend(graph, inputs):
        is_compiling.set()
        may_end.wait(60)
        return graph

    other = nn.Linear(2, 2)
    thread = threading.Thread(target=lambda: torch.compile(other, backend=backend)(torch.rand(1, 2)))
    thread.start()
    assert is_compiling.wait(60)
    yield
    may_end.set()
    thread.join()
    torch._dynamo.reset()


@pytest.mark.usefixtures("while_compiling")
def test_no_call_is_lost_while_another_thread_compiles(model):
    with capture(model, ["0", "2"], io="both") as acts:
        for batch in BATCHES:
            model(batch)
    for name in ("0", "2"):
        assert [call.output.shape[0] for call in acts.calls(name)] == [4] * 5
    with capture(model, "0", stop=True) as acts:
        assert model(BATCHES[0]) is None
    assert torch.equal(acts["0"], model[0](BATCHES[0]).detach())
    assert hook_count(model) == 0


@pytest.mark.usefixtures("while_compiling")
def test_a_survey_sees_all_inputs_while_another_thread_compiles(model):
    found = survey(model, BATCHES, ["0", "2"], progress=False)
    assert found.samples_seen == 20
    assert found.stats["0"].count.tolist() == [20 * 16] * 4
    assert found.stats["2"].count.tolist() == [20 * 4] * 2


def test_compiled_and_exported_code_keeps_nothing(model):
    with capture(model, "0") as acts:
        torch.export.export(model, (BATCHES[0],), strict=False)
    assert acts.not_called == ("0",)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    manager = capture(model, "0")
    acts = manager.__enter__()
    with torch.compiler.set_stance("default"):  # as where another thread compiles what is hooked here
        torch.compile(model, backend=backend)(BATCHES[0])
    manager.__exit__(None, None, None)
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert acts.not_called == ("0",)


def test_a_survey_says_which_layers_saw_fewer_inputs():
    class Now(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.seldom = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)
            self.batches = 0

        def forward(self, value):
            self.batches += 1
            value = self.always(value)
            return self.seldom(value) if self.batches % 2 else value

    with pytest.warns(
        UserWarning, match=r"fewer than the 20 inputs of the survey: `seldom` 12; they did not run"
    ):
        found = survey(Now(), BATCHES, ["always", "seldom"], progress=False)
    assert found.stats["seldom"].count.tolist() == [12 * 36] * 2
