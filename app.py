"""Open the demo of finished runs: `python app.py --help`. The program is in audio_dendrites/results/demo.py."""

import sys
from importlib.util import find_spec

from audio_dendrites.errors import UserError

if __name__ == "__main__":
    if find_spec("gradio") is None:
        sys.exit("error: app.py needs gradio. Install it with: pip install -e '.[demo]'")
    from audio_dendrites.results.demo import main

    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
