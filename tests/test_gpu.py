"""What the page says when a shared GPU is not to be had; the rest is tests/browser/test_zerogpu.py."""

import gradio as gr
import pytest

from demos.page.gpu import in_words, on_gpu


@pytest.mark.parametrize(
    "error, said",
    [
        (
            gr.Error(
                "You have exceeded your free ZeroGPU quota (60s requested vs. -3s left). Try again in 3:12:05. Subscribe",
                title="ZeroGPU quota exceeded",
            ),
            "this asks for 60 s of GPU time, and -3 s of your quota are left. Try again in 3:12:05",
        ),
        (gr.Error("You have exceeded your ZeroGPU runs limit. "), "no GPU time is left for you now"),
        (gr.Error("Space app has reached its GPU limit. Try re-running outside"), "no GPU time is left for you now"),
        (gr.Error("You have too many ZeroGPU credits allocated to running tasks. "), "no GPU time is left for you now"),
        (gr.Error("The requested GPU duration (300s) is larger than the maximum allowed"), "ask for less"),
        (gr.Error("No GPU was available after 60s. Retry later"), "no GPU was free within a minute"),
        (gr.Error("GPU task aborted"), "the time that was asked for was over"),
        (gr.Error("Expired ZeroGPU proxy token"), "reload it, and press the button again"),
        (RuntimeError("Connection closed by visitor while queueing"), "the page was closed while this waited"),
        (
            RuntimeError("ZeroGPU API /schedule error: 500"),
            "the shared GPU failed (RuntimeError: ZeroGPU API /schedule",
        ),
    ],
)
def test_what_spaces_says_is_told_in_plain_words_with_what_to_do(error, said):
    assert said in in_words(error)


def test_elsewhere_work_is_done_as_it_is():
    assert on_gpu(print, print) is print
