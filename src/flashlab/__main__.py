import sys

from flashlab.cli import main

sys.exit(main())
