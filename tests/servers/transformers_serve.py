"""`transformers serve`, whose script an environment on top of another does not have."""

import sys

from transformers.cli.transformers import main

sys.argv[0] = "transformers"
main()
