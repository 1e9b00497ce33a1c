"""Open the demo of finished runs: `python app.py --help`. The program is in audio_dendrites/results/demo.py."""

from importlib.util import find_spec

from audio_dendrites.errors import UserError, run_program


def main(arguments: list[str]) -> None:
    """Open the demo.

    Raises:
        UserError: gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise UserError("app.py needs gradio. Install it with: pip install -e '.[demo]'")
    from audio_dendrites.results import demo

    demo.main(arguments)


if __name__ == "__main__":
    run_program(main)
