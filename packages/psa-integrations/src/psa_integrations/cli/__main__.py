"""`python -m psa_integrations.cli`, the same as `psa`."""

import sys

from psa_integrations.cli import main

sys.exit(main())
