"""The user's command: `deepspeed platform/launch.py --task retrieval [key=value ...]`; `--help` teaches it."""

import sys

from emcl.launch import main

if __name__ == "__main__":
    sys.exit(main())
