"""Pure functions without parameters, where time is spent: a plain `*_reference` beside each fast one."""
