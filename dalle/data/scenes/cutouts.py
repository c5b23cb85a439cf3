"""Drawings cut out of their white ground, and painted in another colour.

A cut-out is RGBA float32 (H, W, 4) in [0, 1], not premultiplied, cropped to its ink.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

from dalle.data.scenes.colours import THING_COLOURS
from dalle.data.scenes.components import flood

CutOut = npt.NDArray[np.float32]

_WHITE = 0.96  # a pixel whose channels are all above it belongs to the ground if it touches the ground
_MIN_SATURATION = 0.22  # below it a pixel has no hue to speak of
_HUE_REACH = 32 / 360  # what is painted: hues this near to the drawing's main one, as a share of the circle
_DARK = 0.35  # value below which a pixel without hue is black paint
# A drawing can be painted when this share of its ink has the main hue.
MIN_PAINTED = 0.5


def cut_out(picture: Image.Image, *, has_holes: bool) -> CutOut:
    """Cut a drawing out of white: the white connected to the border, with holes all white, turns clear.

    A pixel on the edge is a mixture of white and the colour beside it: its alpha is its share of that colour.
    Raises ValueError when nothing is left.
    """
    rgb = np.asarray(picture, dtype=np.float32) / np.float32(255)  # (H, W, 3)
    is_white = rgb.min(axis=2) > _WHITE
    border = np.zeros_like(is_white)
    border[[0, -1]] = border[:, [0, -1]] = True
    ground = is_white if has_holes else flood(is_white, border)
    colour, alpha = rgb.copy(), np.where(ground, 0, 1).astype(np.float32)
    edge = ~ground & _dilate(_dilate(ground))
    beside = _darkest_neighbour(rgb, edge)  # (E, 3)
    away = 1 - beside  # from white to the paint
    share = ((1 - rgb[edge]) * away).sum(axis=1) / np.maximum((away**2).sum(axis=1), 1e-4)
    alpha[edge] = share.clip(0, 1)
    colour[edge] = beside
    rows, columns = np.nonzero(alpha > 0.05)
    if not len(rows):
        raise ValueError("the drawing is blank")
    whole = np.dstack([colour, alpha])
    return whole[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _dilate(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    padded = np.pad(mask, 1)
    h, w = mask.shape
    grown = mask.copy()
    for y, x in ((0, 1), (2, 1), (1, 0), (1, 2)):
        grown |= padded[y : y + h, x : x + w]
    return grown


def _darkest_neighbour(rgb: CutOut, where: npt.NDArray[np.bool_]) -> CutOut:
    """Return for each pixel that `where` marks the colour farthest from white in its 5 x 5 neighbourhood, (E, 3)."""
    rows, columns = np.nonzero(where)
    reach = np.arange(5)
    padded = np.pad(rgb, ((2, 2), (2, 2), (0, 0)), constant_values=1)
    near = padded[rows[:, None, None] + reach[:, None], columns[:, None, None] + reach]  # (E, 5, 5, 3)
    near = near.reshape(len(rows), 25, 3)
    darkest = ((1 - near) ** 2).sum(axis=2).argmax(axis=1)
    found: CutOut = near[np.arange(len(rows)), darkest]
    return found


def painted_share(cut: CutOut) -> float:
    """Return the share of a drawing's ink that `paint` would give another colour."""
    ink = cut[..., 3] > 0.5
    return float((_paint_mask(cut) & ink).sum() / max(1, ink.sum()))


def paint(cut: CutOut, word: str) -> CutOut:
    """Return the drawing with its main colour changed to a colour word; shading and other colours stay."""
    hsv, target = (
        _to_hsv(cut[..., :3]),
        _to_hsv(np.array([[THING_COLOURS[word]]], np.float32) / np.float32(255))[0, 0],
    )
    mask = _paint_mask(cut)
    if not mask.any():
        return cut
    saturation, value = (float(np.median(hsv[..., channel][mask])) for channel in (1, 2))
    painted = np.empty_like(hsv)
    painted[..., 0] = target[0]
    painted[..., 1] = target[1] * (hsv[..., 1] / max(saturation, 0.05)).clip(0.6, 1.25)
    painted[..., 2] = target[2] * (hsv[..., 2] / max(value, 0.05)).clip(0.6, 1.2)
    rgb = np.where(mask[..., None], _to_rgb(painted.clip(0, 1)), cut[..., :3])
    return np.dstack([rgb, cut[..., 3]]).astype(np.float32)


def _paint_mask(cut: CutOut) -> npt.NDArray[np.bool_]:
    """Return the pixels (H, W) of the drawing's main hue; of black, where it has hardly any hue."""
    hsv = _to_hsv(cut[..., :3])
    ink = cut[..., 3] > 0.5
    has_hue = hsv[..., 1] > _MIN_SATURATION
    is_coloured = has_hue & (hsv[..., 2] > 0.2)
    if (is_coloured & ink).sum() < 0.25 * ink.sum():
        is_black: npt.NDArray[np.bool_] = ~has_hue & (hsv[..., 2] < _DARK)
        return is_black
    weights = (hsv[..., 1] * hsv[..., 2])[is_coloured & ink]
    bins = np.bincount((hsv[..., 0][is_coloured & ink] * 36).astype(int) % 36, weights, 36)
    smooth = bins + np.roll(bins, 1) + np.roll(bins, -1)
    main = (int(smooth.argmax()) + 0.5) / 36
    distance = np.abs((hsv[..., 0] - main + 0.5) % 1 - 0.5)
    has_main_hue: npt.NDArray[np.bool_] = is_coloured & (distance < _HUE_REACH)
    return has_main_hue


def _to_hsv(rgb: CutOut) -> CutOut:
    """Return hue, saturation and value in [0, 1] of RGB in [0, 1], (H, W, 3)."""
    red, green, blue = (rgb[..., i] for i in range(3))
    # Not rgb.max(axis=2): NumPy reduces a short last axis many times slower.
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    spread = high - low
    safe = np.maximum(spread, 1e-6)
    hue = np.select(
        [high == red, high == green],
        [(green - blue) / safe % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    return np.dstack([hue / 6, spread / np.maximum(high, 1e-6), high]).astype(np.float32)


def _to_rgb(hsv: CutOut) -> CutOut:
    """Invert `_to_hsv`."""
    hue, saturation, value = (hsv[..., i] for i in range(3))
    channels = []
    for offset in (5, 3, 1):
        k = (offset + hue * 6) % 6
        channels.append(value - value * saturation * np.minimum(k, 4 - k).clip(0, 1))
    return np.dstack(channels).astype(np.float32)


def to_image(cut: CutOut) -> Image.Image:
    """Return a cut-out as an RGBA picture of 8 bits."""
    return Image.fromarray(np.rint(cut.clip(0, 1) * 255).astype(np.uint8), "RGBA")
