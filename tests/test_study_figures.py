"""The charts of a study show the study's own numbers, in both themes."""

import base64
import io

import pytest
import torch
from tiny import rand

from peftlab.compare import lowrank
from peftlab.compare.lowrank import Spectrum
from peftlab.compare.study import MatrixStudy, Study
from peftlab.show import figures, weight_figures
from peftlab.show import studies as draw

W, DELTA = Spectrum(tuple(float(40 - i) for i in range(40))), Spectrum((3.0, 1.0))


def studied(layer: int, size: float) -> MatrixStudy:
    w, d = rand(8, 6), size * torch.outer(rand(8, 1)[:, 0], rand(6, 1)[:, 0])
    return MatrixStudy(
        name=f"layers.{layer}.q", short_name="q", role="query", layer=layer, shape=(8, 6), weight=lowrank.spectrum(w),
        delta=lowrank.spectrum(d), amplification=lowrank.amplification(w, d, 1), intruders=lowrank.intruders(w, w + d),
    )  # fmt: skip


@pytest.mark.parametrize("theme", figures.THEMES)
def test_energy_and_singular_values_are_those_of_the_spectra(theme):
    for chart in (draw.energy(W, {"rank 2": DELTA}, theme), draw.singular_values(W, {"rank 2": DELTA}, theme)):
        weight, delta = chart.data
        assert weight.line.color == figures.PALETTE[theme]["frozen"] and delta.name == "rank 2"
        assert weight.x[0] == 1 and weight.x[-1] == 40 and tuple(delta.x) == (1, 2)
    kept, values = draw.energy(W, {"rank 2": DELTA}, theme), draw.singular_values(W, {"rank 2": DELTA}, theme)
    assert tuple(kept.data[1].y) == pytest.approx((90, 100))
    assert list(kept.data[0].y) == [100 * W.energy(r) for r in kept.data[0].x]
    assert tuple(values.data[1].y) == pytest.approx((1, 1 / 3))


def test_sizes_are_of_the_asked_kind_by_layer():
    of = Study("a", "m", "lora", tuple(studied(layer, 0.1 * (layer + 1)) for layer in range(3)))
    (line,) = draw.sizes({"mine": of}, "query", "light").data
    assert tuple(line.x) == (0, 1, 2)
    assert tuple(line.y) == pytest.approx(tuple(100 * m.relative_size for m in of.matrices))
    assert draw.sizes({"mine": of}, "value", "light").data[0].x == ()


def test_shared_shows_phi_beside_what_chance_gives():
    a, b = (lowrank.directions(rand(8, 6), 3) for _ in range(2))
    overlap = lowrank.overlap(a, b)
    (heat,) = draw.shared(overlap, "a", "b", "dark").data
    assert tuple(map(tuple, heat.z)) == overlap.grid
    assert heat.customdata[0][2] == overlap.random(1, 3) == 3 / 6


def test_a_picture_has_a_pixel_a_number():
    from PIL import Image

    uri = weight_figures.picture(torch.tensor([[0.0, -1.0, 0.5], [2.0, 0.1, 0.0]]), 1.0, "#0072B2")
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    assert image.size == (3, 2) and image.getpixel((1, 0)) == (0, 0x72, 0xB2, 255)
    assert [image.getpixel((x, y))[3] for y in range(2) for x in range(3)] == [0, 255, 127, 255, 25, 0]
