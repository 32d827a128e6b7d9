"""Where commands run and where slots' files live: this machine, or one over SSH."""
