"""The command line: a thin command for each public function, same names, same defaults.

Results go to stdout (a table, or one JSON object with ``--json``), everything else to stderr. Exit codes:
0 done, 2 bad usage or input, 1 failed.
"""

from srcr.cli.process import main

__all__ = ["main"]
