import sys

from sae_italian.cli import main

sys.exit(main())
