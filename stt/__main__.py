"""`python -m stt` is the command `stt`."""
import sys

from stt.verbs import main

sys.exit(main())
