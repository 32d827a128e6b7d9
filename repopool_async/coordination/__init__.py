"""Where slot state and leases live: files on one machine, PostgreSQL for many."""
