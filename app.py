"""Open a page in the browser to try finished runs: record, upload or choose a sound, and see the scores of each model.

    python app.py RUN [RUN ...] [--port 7860]

Decoding, windows and scores are those of predict.py. The examples are generated. The page needs no network, and only
this machine can open it unless --server_name says otherwise. Ctrl-C ends the program and deletes the sounds.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec

from audio_dendrites.errors import UserError, run_program

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("runs", nargs="+", metavar="RUN", help="Run folders, Hub ids, or Hub ids@revision.")
PARSER.add_argument("--port", type=int, help="Default: the first free one from 7860.")
PARSER.add_argument("--server_name", default="127.0.0.1", help="Address to listen at. Default: 127.0.0.1.")
PARSER.add_argument(
    "--trust_remote_code",
    action="store_true",
    help="Run the Python code in the repository of a model that needs it. Read the code first.",
)


def main(arguments: Sequence[str]) -> None:
    """Read the command line and open the page."""
    options = PARSER.parse_args(arguments)
    if options.port is not None and not 1 <= options.port <= 65535:
        raise UserError(f"--port must be from 1 to 65535, got {options.port}")
    if find_spec("gradio") is None:
        raise UserError("app.py needs gradio. Install it with: pip install -e '.[demo]'")
    from audio_dendrites.results.demo import serve  # here, so that --help does not wait for gradio

    serve(options.runs, options.port, options.server_name, options.trust_remote_code)


if __name__ == "__main__":
    run_program(main)
