"""The table says what the layers of a network are, against what they put out and by hand."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch import nn

from torchlens_viz import capture, layers, receptive_field
from torchlens_viz.errors import CaptureError, InvalidArgumentError, InvalidTypeError, LayerNotFoundError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        out = self.norm(self.conv(maps))
        out += maps
        return out


class Net(nn.Module):
    """Defined in another order than it runs, with a shared, an unused and an in-place layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 2)
        self.relu = nn.ReLU(inplace=True)
        self.stem = nn.Conv2d(3, 4, 5, stride=2, padding=2)
        self.again = self.relu
        self.block = Block()
        self.pool = nn.MaxPool2d(2)
        self.wide = nn.Conv2d(4, 6, 3)
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.block(self.relu(self.stem(images)))
        maps = self.relu(self.wide(self.pool(maps)))
        return self.head(maps.mean((2, 3)))


IMAGES = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))


def both_ways(net: nn.Module, shape=(2, 3, 32, 40)):
    return layers(net, input_shape=shape), layers(net, torch.rand(shape))


def test_rows_are_in_execution_order_and_say_what_ran():
    for table in both_ways(Net()):
        assert [row.name for row in table] == [
            *("stem", "relu", "block", "block.conv", "block.norm", "pool", "wide", "head")
        ]
        assert table.not_called == ("unused",)
        assert table.input_shapes == ((2, 3, 32, 40),)
        assert table["relu"].calls == 2
        assert table["again"] is table["relu"]
        assert [row.name for row in table if row.is_block] == ["block"]


def test_shapes_are_those_that_the_layers_put_out():
    net = Net().eval()
    with torch.no_grad(), capture(net, "*") as acts:
        net(IMAGES)
    for table in both_ways(net):
        for row in table:
            assert row.output_shape == acts.calls(row.name)[0].shape
            assert row.outputs == 1
            assert row.layout == ("NC" if row.name == "head" else "NCHW")
            assert row.maps == (None if row.name == "head" else row.output_shape[2:])
            assert row.has_maps == (row.name != "head")


def test_receptive_fields_are_those_of_one_layer_at_a_time():
    net = Net()
    for table in both_ways(net):
        for row in table:
            field = receptive_field(net, row.name, (1, 3, 32, 40))
            assert row.receptive_field == field.size
            assert row.step == (None if row.name == "head" else field.stride)


def test_what_is_written_over_is_said_with_the_layer_that_does():
    for table in both_ways(Net()):
        found = {row.name: row.overwritten_by for row in table if row.overwritten_by}
        assert found == {"stem": "relu", "block.norm": "block", "wide": "relu"}
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.ReLU(inplace=True))
    table = layers(plain, input_shape=(1, 3, 8, 8))
    assert [row.overwritten_by for row in table] == [None, "3", "3", None]  # a flattened map is a view of it


def test_parameters_are_counted_with_those_of_inner_layers():
    net = Net()
    for row in layers(net, input_shape=(1, 3, 32, 32)):
        assert row.parameters == sum(each.numel() for each in net.get_submodule(row.name).parameters())


def test_marks_name_the_layers_to_look_at():
    marks = {row.name: row.marks for row in layers(Net(), IMAGES) if row.marks}
    assert marks == {
        "stem": ("first convolution",),
        "block": ("last at 16 x 20",),
        "pool": ("last at 8 x 10",),
        "wide": ("last at 6 x 8", "last with maps"),
    }
    assert layers(Net(), IMAGES).marked("last with maps").name == "wide"
    assert layers(Net(), IMAGES).marked("no such mark") is None


def test_time_is_shared_only_where_an_image_is_given():
    with_image, without = layers(Net(), IMAGES), layers(Net(), input_shape=(1, 3, 32, 32))
    assert all(row.time_share is None for row in without)
    assert all(0 <= row.time_share <= 1 for row in with_image)
    assert any(row.time_share > 0 for row in with_image)


def test_globs_and_blocks_choose_rows_and_marks_stay_those_of_the_whole():
    table = layers(Net(), IMAGES, layers="block*")
    assert [row.name for row in table] == ["block", "block.conv", "block.norm"]
    assert table["block"].marks == ("last at 16 x 20",)
    assert table.not_called == ()
    assert [row.name for row in layers(Net(), IMAGES, layers="block*", blocks=False)] == [
        "block.conv",
        "block.norm",
    ]
    with pytest.raises(LayerNotFoundError, match=r"no layer is named `blok\*`"):
        layers(Net(), IMAGES, layers="blok*")


def test_a_network_stays_as_it_was():
    net = Net().train()
    net.head.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    layers(net)
    layers(net, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert net.block.training
    assert not net.head.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_network_of_a_terabyte_needs_no_memory():
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 2**17, 3), nn.ReLU(inplace=True), nn.Conv2d(2**17, 2**17, 3))
    table = layers(net, input_shape=(1, 3, 64, 64))
    assert table["2"].parameters == 2**34 * 9 + 2**17
    assert table["0"].overwritten_by == "1"
    assert table["2"].receptive_field == (5, 5)


def test_a_batch_of_the_usual_sizes_is_tried_until_one_runs():
    small = nn.Sequential(nn.Conv2d(1, 2, 5), nn.Flatten(), nn.Linear(2 * 24 * 24, 10))
    assert layers(small).input_shapes == ((1, 1, 28, 28),)
    assert layers(nn.Sequential(nn.Conv1d(12, 4, 7))).input_shapes == ((1, 12, 4096),)
    assert layers(nn.Sequential(nn.Conv3d(1, 4, 3))).input_shapes == ((1, 1, 16, 112, 112),)
    assert layers(nn.Sequential(nn.Linear(7, 4), nn.ReLU())).input_shapes == ((1, 7),)


def test_a_network_that_looks_at_values_runs_as_it_is():
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, images):
            return self.conv(images) if float(images.sum()) == 0 else images

    assert layers(Looking())["conv"].output_shape == (1, 2, 222, 222)
    with pytest.raises(InvalidArgumentError, match=r"meta.*; build it with values, or pass an input"):
        layers(Looking().to("meta"))


def test_wrapped_and_half_networks_are_listed_and_lazy_ones_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    plain = [row.name for row in layers(net, input_shape=(1, 3, 8, 8))]
    for model in (torch.compile(net, backend="eager"), nn.DataParallel(net), net.half()):
        for table in both_ways(model, (1, 3, 8, 8)):
            assert [row.name for row in table] == plain == ["0", "1", "2"]
            assert table["1"].overwritten_by == "2"
    with pytest.raises(InvalidArgumentError, match="`model` has lazy parameters"):
        layers(nn.Sequential(nn.LazyConv2d(4, 3)), IMAGES)


def test_inputs_of_every_kind_are_handed_over():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, image, other):
            return self.conv(image - other)

    a, b = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    for x in ((a, b), {"image": a, "other": b}):
        assert layers(Two(), x).input_shapes == ((1, 3, 8, 8),) * 2
    assert layers(Two()).input_shapes == ((1, 3, 224, 224),) * 2
    conv = nn.Sequential(nn.Conv2d(3, 2, 3)).double()
    assert layers(conv, Image.new("RGB", (20, 10)))["0"].output_shape == (1, 2, 8, 18)

    class Listing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, images):
            return [self.conv(image[None]) for image in images]

    assert layers(Listing(), [a[0], b[0]])["conv"].calls == 2


def test_tokens_are_maps_where_they_lie_in_a_grid():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 4, stride=4)
            self.cls = nn.Parameter(torch.zeros(1, 1, 8))
            self.norm = nn.LayerNorm(8)
            self.dense = nn.Linear(8, 8)

        def forward(self, images):
            tokens = self.embed(images).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], 1)
            return self.dense(self.norm(tokens))[:, 0]

    for table in both_ways(Tokens(), (1, 3, 32, 48)):
        assert [(row.maps, row.is_tokens, row.layout) for row in table] == [
            ((8, 12), False, "NCHW"),
            ((8, 12), True, "NLC"),
            ((8, 12), True, "NLC"),
        ]
        assert table.marked("last with maps").name == "dense"


def test_channels_last_are_found_and_can_be_told():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.LayerNorm(8)

        def forward(self, images):
            return self.norm(self.conv(images).permute(0, 2, 3, 1))

    for table in both_ways(Last(), (1, 3, 8, 9)):
        assert [(row.layout, row.channel_dim, row.maps) for row in table] == [
            ("NCHW", 1, (6, 7)),
            ("NHWC", 3, (6, 7)),
        ]
    told = layers(Last(), torch.rand(1, 3, 8, 9), channel_dim=1)
    assert told["norm"].layout == "NCHW"
    assert told["norm"].maps == (7, 8)


def test_the_table_is_text_json_and_escaped_html():
    class Evil(nn.Conv2d):
        pass

    Evil.__name__ = "<script>alert(1)</script>"
    table = layers(nn.Sequential(Evil(3, 4, 3), nn.ReLU(inplace=True)), torch.rand(1, 3, 8, 8))
    text = str(table).splitlines()
    assert text[0] == "Sequential on an input of shape (1, 3, 8, 8): 2 layers"
    assert text[1].split()[:4] == ["layer", "kind", "output", "layout"]
    assert "(1, 4, 6, 6)" in text[2]
    assert text[2].rstrip().endswith("1               first convolution")
    html = table._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    read = json.loads(table.to_json())
    assert read == table.to_dict()
    assert read["rows"][0]["output_shape"] == [1, 4, 6, 6]
    assert read["rows"][0]["overwritten_by"] == "1"
    assert read["rows"][0]["has_maps"] is True
    assert len(table) == len(read["rows"]) == 2
    assert table[0].name == "0"
    with pytest.raises(LayerNotFoundError, match="no row is named `conv`; there are `0`, `1`"):
        table["conv"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_cannot_be_listed_says_why():
    with pytest.raises(InvalidTypeError, match=r"`model` must be a torch.nn.Module, got Tensor"):
        layers(torch.zeros(3))
    with pytest.raises(InvalidArgumentError, match="`input_shape` has no effect where `x` is given"):
        layers(Net(), IMAGES, input_shape=(1, 3, 8, 8))
    with pytest.raises(InvalidArgumentError, match=r"with sizes above 0, got \(1, 0\)"):
        layers(Net(), input_shape=(1, 0))
    with pytest.raises(InvalidTypeError, match=r"in ints, got \('a',\)"):
        layers(Net(), input_shape=("a",))
    with pytest.raises(InvalidArgumentError, match=r"Net does not run on zeros of that shape .*RuntimeError"):
        layers(Net(), input_shape=(1, 5, 32, 32))
    fussy = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(11, 2))
    with pytest.raises(InvalidArgumentError, match=r"`x` must be given: .*any usual shape \(RuntimeError"):
        layers(fussy)
    with pytest.raises(CaptureError, match="TorchScript"):
        layers(torch.jit.trace(nn.Conv2d(3, 2, 3), torch.zeros(1, 3, 8, 8)))


def test_a_call_that_fails_and_is_caught_leaves_the_others_right():
    class Trying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad, self.good = nn.Conv2d(5, 2, 3), nn.Conv2d(3, 2, 3)

        def forward(self, images):
            try:
                return self.bad(images)
            except RuntimeError:
                return self.good(images)

    for table in both_ways(Trying(), (1, 3, 8, 8)):
        assert [row.name for row in table] == ["good"]
        assert table.not_called == ("bad",)
