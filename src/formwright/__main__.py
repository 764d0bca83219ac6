"""`python -m formwright`, the same as `formwright`."""

from formwright.cli import main

main()
