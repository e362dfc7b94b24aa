"""The look of the page: theme, scripts, and how it is launched."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.routing import Route

from demos.page import serving
from peftlab.places import ASSETS

COLOURS = {
    ("#FBFBFA", "#101215"): ("body_background_fill",),
    ("#1A1D21", "#ECEEF1"): ("body_text_color", "block_label_text_color", "block_title_text_color"),
    ("#565D66", "#A6ADB7"): ("body_text_color_subdued", "block_info_text_color"),
    ("transparent", "transparent"): ("block_background_fill", "panel_background_fill", "button_primary_border_color"),
    ("#D9DCE0", "#3A3F47"): ("border_color_primary",),
    ("#B9BEC5", "#555C66"): ("input_border_color", "button_secondary_border_color"),
    ("#FFFFFF", "#16181C"): ("input_background_fill", "button_primary_text_color"),
    ("#FFFFFF", "#1D2025"): ("button_secondary_background_fill",),
    ("#B34E00", "#FF8F4A"): ("button_primary_background_fill",),
    ("#8F3E00", "#FFA56E"): ("button_primary_background_fill_hover",),
    ("#0072B2", "#0072B2"): ("checkbox_background_color_selected", "checkbox_border_color_selected"),
    ("#0072B2", "#56B4E9"): ("slider_color",),
}
"""What has each of the theme's colours, which are in light and in dark."""


def script(*names: str) -> str:
    """Files of this folder as a browser gets them: without indentation, and without lines that are comments."""
    lines = "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names).splitlines()
    return "\n".join(line for line in map(str.strip, lines) if line and not line.startswith(("//", "/**", "* ")))


def launch_options(routes: Sequence[Route] = ()) -> dict[str, Any]:
    """Arguments of `Blocks.launch`: the look, the limit on what visitors can send, and what is served beside Gradio's own."""
    import plotly

    colours = {
        name + end: pair[i] for pair, names in COLOURS.items() for name in names for i, end in ((0, ""), (1, "_dark"))
    }
    base = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="gray",
        text_size="lg",
        radius_size="sm",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )
    frames = {"block_border_width": "0px", "block_shadow": "none", "input_border_width": "1px"}
    charts = Path(plotly.__file__).resolve().parent / "package_data"  # its plotly.js: nothing is fetched from elsewhere
    gr.set_static_paths([charts])
    return {
        "theme": base.set(**colours, **frames, block_title_text_weight="600"),
        "css_paths": [ASSETS / "style.css"],
        "head": f'<script defer src="gradio_api/file={charts / "plotly.min.js"}"></script>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "max_file_size": "5mb",
        "footer_links": ["settings"],
        **serving.options(routes),
    }
