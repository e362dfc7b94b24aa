"""The look of the page: theme, scripts, and how it is launched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from peftlab.places import ASSETS

FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
COLOURS = {
    "body_background_fill": ("#FBFBFA", "#101215"),
    "body_text_color": ("#1A1D21", "#ECEEF1"),
    "body_text_color_subdued": ("#565D66", "#A6ADB7"),
    "block_background_fill": ("transparent", "transparent"),
    "block_info_text_color": ("#565D66", "#A6ADB7"),
    "block_label_text_color": ("#1A1D21", "#ECEEF1"),
    "block_title_text_color": ("#1A1D21", "#ECEEF1"),
    "border_color_primary": ("#D9DCE0", "#3A3F47"),
    "input_background_fill": ("#FFFFFF", "#16181C"),
    "input_border_color": ("#B9BEC5", "#555C66"),
    "button_primary_background_fill": ("#B34E00", "#FF8F4A"),
    "button_primary_background_fill_hover": ("#8F3E00", "#FFA56E"),
    "button_primary_text_color": ("#FFFFFF", "#16181C"),
    "button_primary_border_color": ("transparent", "transparent"),
    "checkbox_background_color_selected": ("#0072B2", "#0072B2"),
    "checkbox_border_color_selected": ("#0072B2", "#0072B2"),
    "button_secondary_background_fill": ("#FFFFFF", "#1D2025"),
    "button_secondary_border_color": ("#B9BEC5", "#555C66"),
    "slider_color": ("#0072B2", "#56B4E9"),
    "panel_background_fill": ("transparent", "transparent"),
}
"""The theme's colours: each in light, and in dark."""


def script(*names: str) -> str:
    """Files of this folder as a browser gets them: without indentation, and without lines that are comments."""
    lines = "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names).splitlines()
    return "\n".join(line for line in map(str.strip, lines) if line and not line.startswith(("//", "/**", "* ")))


def theme() -> gr.themes.Base:
    light, dark = ({name + end: pair[i] for name, pair in COLOURS.items()} for i, end in enumerate(("", "_dark")))
    base = gr.themes.Base(
        primary_hue="blue", neutral_hue="gray", text_size="lg", radius_size="sm", font=FONT, font_mono=MONO
    )
    frames = {"block_border_width": "0px", "block_shadow": "none", "input_border_width": "1px"}
    return base.set(**light, **dark, **frames, block_title_text_weight="600")


def plotly_script() -> str:
    """The copy of plotly.js that the plotly package ships, so that nothing is fetched from elsewhere."""
    import plotly

    folder = Path(plotly.__file__).parent / "package_data"
    gr.set_static_paths([folder])
    return f'<script defer src="gradio_api/file={folder / "plotly.min.js"}"></script>'


def launch_options() -> dict[str, Any]:
    """Arguments of `Blocks.launch`: the look, and the limit on what visitors can send."""
    return {
        "theme": theme(),
        "css_paths": [ASSETS / "style.css"],
        "head": plotly_script() + '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "max_file_size": "5mb",
        "footer_links": ["settings"],
    }
