"""A bare Gradio app, beside which `peftlab bench serve` measures the page. It echoes through the same mechanism: a server
function. It starts as `python echo.py`, at the port that GRADIO_SERVER_PORT says.
"""

import gradio as gr


def answer(question: object) -> object:
    return question


with gr.Blocks() as demo:
    gr.Textbox(label="Anything")
    gr.HTML("", js_on_load="server.answer({})", server_functions=[answer])

if __name__ == "__main__":
    demo.launch()
